"""Planned attention in torchtitan: losses and updated weights are those of one process.

torchtitan asks for an accelerator: ``tests/torchtitan_on_cpu.py`` is what lets it run here, in
processes of their own.
"""

import shutil
import types
from operator import attrgetter

import numpy as np
import pytest

pytest.importorskip("torchtitan")
pytest.importorskip("spmd_types")

from tests.pool import GlooPool
from tests.torchtitan_cases import compare, make_config, planned, train_from_command_line


@pytest.fixture(scope="module")
def ranks():
    """Processes in which torchtitan runs on the CPU."""
    pool = GlooPool(4)
    yield pool
    pool.close()


TENSOR = {"tensor_parallel_degree": 2}
WHOLE_ROWS = {"tensor_parallel_degree": 4, "enable_sequence_parallel": False}
REPLICATED = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
CASES = {
    "llama3 TP SP chunked loss": ("llama3", {"parallelism": TENSOR, "chunked": True}),
    "llama3 HSDP accumulated recomputed": (
        "llama3",
        {"parallelism": REPLICATED, "training": {"global_batch_size": 8}, "recomputed": "FullAC"},
    ),
    "llama3 compiled selective": ("llama3", {"recomputed": "SelectiveAC", "compiled": "aot_eager"}),
    "qwen3 TP SP": ("qwen3", {"parallelism": TENSOR}),
    "deepseek_v3 balanced": ("deepseek_v3", {"balanced": True}),
    "deepseek_v3 TP alone": ("deepseek_v3", {"parallelism": WHOLE_ROWS}),
    "gpt_oss EP": ("gpt_oss", {"parallelism": {"expert_parallel_degree": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(ranks, case):
    name, options = CASES[case]
    losses, wanted, differences = ranks.run(compare, name, options)[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert max(differences.values()) < 1e-5, max(differences.items(), key=lambda pair: pair[1])


def test_resuming_is_exact(ranks, tmp_path):
    """The example, by torchtitan's command line and checkpointer."""
    words = "--training.steps 3 --training.seq-len 256 --dataloader.tokens-per-batch 700"
    words += " --checkpoint.enable --checkpoint.interval 2 --checkpoint.no-last-save-model-only"
    words += " --checkpoint.keep-latest-k 0 --training.mixed-precision-param float32"
    losses, weights = ranks.run(train_from_command_line, tmp_path, words.split())[0]
    shutil.rmtree(tmp_path / "checkpoint" / "step-3")
    again, same = ranks.run(train_from_command_line, tmp_path, words.split())[0]
    assert len(losses) == 3
    assert again == losses[2:]
    for name, values in weights.items():
        assert np.array_equal(values, same[name]), name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parallelism.context_parallel_degree", 2),
        ("parallelism.pipeline_parallel_degree", 2),
        ("parallelism.spmd_backend", "full_dtensor"),
        ("parallelism.tensor_parallel_degree", 2),
        ("training.local_batch_size", 8),
        ("training.disable_cuda_graphs", False),
        ("training.seq_len", 16),
        ("debug.spmd_typechecking", True),
        ("validator.enable", True),
        ("dataloader.dataset", "c4"),
        ("dataloader.dataset_path", "data"),
    ],
)
def test_refused_by_name(field, value, tmp_path):
    from dcp.integrations.torchtitan import check_config

    config = planned("gpt_oss", tmp_path, data={"options": {"max_seqlen": 32}})
    check_config(config)
    part, _, name = field.rpartition(".")
    setattr(attrgetter(part)(config), name, value)
    with pytest.raises(
        ValueError, match=rf"^{field}={value!r} cannot be honoured: .*(set it|leave it)"
    ):
        check_config(config)


def test_refused_where_torchtitan_itself_is_wrong(tmp_path):
    from dcp.integrations.torchtitan import check_config

    with pytest.raises(ValueError, match=r"^parallelism\.enable_sequence_parallel=True cannot"):
        check_config(planned("deepseek_v3", tmp_path, parallelism=TENSOR))


def test_models_that_cannot_be_planned_are_refused(tmp_path):
    from torchtitan.models.common.attention import BaseAttention, VarlenAttention
    from torchtitan.protocols.module import Module

    from dcp.integrations.torchtitan import PlannedDataLoader, check_config, planned_config

    def said(change, kind="llama3"):
        config = make_config(kind, tmp_path)
        change(config.model_spec.model)
        with pytest.raises(ValueError) as refused:
            planned_config(config, PlannedDataLoader.Config())
        return str(refused.value)

    def attention_of_ones_own(model):
        inner = model.layers[1].attention.inner_attention
        model.layers[1].attention = BaseAttention.Config(n_heads=4, inner_attention=inner)

    def linear_attention(model):
        model.layers[1].attention = None

    def both_ways(model):
        model.layers[0].attention.inner_attention = VarlenAttention.Config(window_size=(-1, -1))

    def inner_of_ones_own(model):
        model.layers[1].attention.inner_attention = Module.Config()

    def later_tokens(model):
        model.mtp_layers = model.layers[:1]

    assert "layers of BaseAttention cannot be planned" in said(attention_of_ones_own)
    assert "layers of NoneType cannot be planned" in said(linear_attention)
    assert "window_size=(-1, -1) of GQAttention cannot be honoured" in said(both_ways)
    assert "inner_attention of type Module cannot be planned" in said(inner_of_ones_own)
    assert "mtp_layers of DeepSeekV3Model cannot" in said(later_tokens, "deepseek_v3")
    with pytest.raises(ValueError, match=r"takes a Trainer\.Config with a model_spec"):
        planned_config(planned("llama3", tmp_path), PlannedDataLoader.Config())
    with pytest.raises(ValueError, match="must be a PlannedDataLoader"):
        check_config(make_config("llama3", tmp_path))
    config = planned("llama3", tmp_path)
    config.model_spec = make_config("llama3", tmp_path).model_spec
    with pytest.raises(ValueError, match="make the configuration with planned_config"):
        check_config(config)


def test_layers_and_masks_must_go_together(tmp_path):
    from dcp.integrations.torchtitan_attention import asked_of, masks_of

    model = planned("gpt_oss", tmp_path).model_spec.model
    asked = asked_of(model, dtype="bfloat16", tensor_parallel=2)
    assert asked.masks == {"sliding": "sliding_window:window=20", "full": "causal"}
    assert asked.weights == {"sliding": 1, "full": 1}
    heads = model.layers[0].attention
    assert asked.spec.num_heads == heads.n_heads // 2
    assert asked.spec.num_kv_heads == heads.n_kv_heads // 2
    plan = types.SimpleNamespace(masks={"default": None})
    with pytest.raises(ValueError, match=r"the plan has masks default and none called 'full'"):
        masks_of(plan, asked)
    plain = asked_of(
        planned("llama3", tmp_path).model_spec.model, dtype="float32", tensor_parallel=1
    )
    assert masks_of(plan, plain) == {"full": "default"}
    model.layers[1].attention.inner_attention.window = 30
    with pytest.raises(ValueError, match=r"windows \[20, 30\]: a plan has"):
        asked_of(model, dtype="bfloat16", tensor_parallel=1)


def test_attention_without_a_plan_or_with_another_transform_is_refused():
    import torch

    from dcp.integrations.torchtitan import PlannedAttention
    from dcp.integrations.torchtitan_attention import _sink

    inner = PlannedAttention.Config().build()
    rows = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="got attention_masks of type NoneType"):
        inner(rows, rows, rows, attention_masks=None)
    with pytest.raises(ValueError, match=r"out_transform=.* cannot be honoured"):
        _sink(lambda out, lse: out)
