"""Planned attention in torchtitan: losses and updated weights are those of one process.

torchtitan asks for an accelerator: ``tests/torchtitan_on_cpu.py`` is what lets it run here, in
processes of their own.
"""

import pytest

pytest.importorskip("torchtitan")
pytest.importorskip("spmd_types")

from tests.pool import GlooPool
from tests.torchtitan_cases import compare


@pytest.fixture(scope="module")
def ranks():
    """Processes in which torchtitan runs on the CPU."""
    pool = GlooPool(4)
    yield pool
    pool.close()


TENSOR = {"tensor_parallel_degree": 2}
WHOLE_ROWS = {**TENSOR, "enable_sequence_parallel": False}
REPLICATED = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
CASES = {
    "llama3": ("llama3", {}),
    "llama3 TP SP chunked loss": ("llama3", {"parallelism": TENSOR, "chunked": True}),
    "llama3 HSDP accumulated recomputed": (
        "llama3",
        {"parallelism": REPLICATED, "training": {"global_batch_size": 8}, "recomputed": "FullAC"},
    ),
    "llama3 compiled selective": ("llama3", {"recomputed": "SelectiveAC", "compiled": "aot_eager"}),
    "qwen3 TP SP": ("qwen3", {"parallelism": TENSOR}),
    "deepseek_v3 balanced": ("deepseek_v3", {"balanced": True}),
    "deepseek_v3 TP": ("deepseek_v3", {"parallelism": WHOLE_ROWS}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss EP": ("gpt_oss", {"parallelism": {"expert_parallel_degree": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(ranks, case):
    name, options = CASES[case]
    losses, wanted, differences = ranks.run(compare, name, options)[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert max(differences.values()) < 1e-5, max(differences.items(), key=lambda pair: pair[1])
