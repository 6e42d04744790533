"""``dcp doctor --megatron``: is Megatron-Core here, and is planned attention equal to its own?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dcp.launch.group import joined_group
from dcp.launch.ranks import run_ranks

LENGTHS = (70, 33, 1, 9)
VOCABULARY, MOST_ERROR = 64, 1e-4
SUPPORTED = (
    "tensor, sequence, pipeline (also interleaved), expert and data parallelism; GQA, latent "
    "attention, windows, sinks, scaled rotary embeddings; MoE and its auxiliary losses; "
    "recomputation; the distributed optimizer"
)


def checks(num_processes: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """What :func:`dcp.doctor.report` makes and prints."""
    yield "megatron-core", _version
    yield f"planned GPT on {num_processes} ranks", partial(_planned, num_processes)
    yield "supported", lambda: SUPPORTED
    yield "refused by name", _refused


def _version() -> str:
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        raise ValueError("not installed: pip install --no-deps megatron-core") from None
    from dcp.integrations import megatron  # fails where it lacks what planned attention needs

    return f"{found}, {len(megatron.__all__)} names in dcp.integrations.megatron"


def _refused() -> str:
    from dcp.integrations.megatron_checks import REFUSED

    return ", ".join(REFUSED)


def _planned(num_processes: int) -> str:
    _version()
    found = run_ranks("dcp.integrations.megatron_doctor:compare", {}, num_processes=num_processes)
    worst = max(each["error"] for each in found)
    if not worst < MOST_ERROR:
        raise AssertionError(f"logits or gradients differ from Megatron's own by {worst:.1e}")
    return f"logits and gradients as by Megatron's own attention, error {worst:.1e}"


def compare(job: dict[str, Any]) -> dict[str, float]:
    """One rank's part: how far logits of its tokens and the gradients of all lie from those of
    Megatron's own attention, document by document."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    with joined_group(torch.device("cpu")), _without_cuda():
        parallel_state.initialize_model_parallel()
        try:
            return {"error": _error()}
        finally:
            parallel_state.destroy_model_parallel()


def _error() -> float:
    from dcp.integrations.megatron import planned_batches, planned_data

    documents = [torch.arange(n).mul(7).remainder(VOCABULARY).numpy() for n in LENGTHS]
    config = _config()
    model, own = _models(config)
    options = {"tokens_per_batch": sum(LENGTHS), "num_workers": 0}
    loader, executor = planned_data(documents, config=config, **options)
    with loader:
        batch = next(planned_batches(loader, executor, config=config))
    logits = model(batch.tokens, batch.positions, None, packed_seq_params=batch.params)
    local = len(batch.local.tokens)
    logits[0, :local].square().sum().backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(found)

    wanted = []
    for document, start, stop in batch.local.pieces.tolist():
        ids = torch.from_numpy(documents[document][start:stop])[None]
        later = torch.ones(1, 1, *[stop - start] * 2, dtype=torch.bool).triu(1)
        wanted.append(own(ids, torch.arange(stop - start)[None], later)[0])
    whole = torch.cat(wanted)
    whole.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in own.parameters()])
    forward = (logits[0, :local] - whole[batch.local.token_indices]).abs().max()
    return float(torch.maximum(forward, (found - gradient).abs().max() / gradient.abs().max()))


def _config() -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _models(config: Any) -> tuple[Any, Any]:
    """A tiny GPT with planned attention, and one with Megatron's, of the same weights."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    from dcp.integrations.megatron import planned_positions, planned_spec

    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    models = [
        GPTModel(
            config,
            each,
            vocab_size=VOCABULARY,
            max_sequence_length=max(LENGTHS),
            position_embedding_type="rope",
        )
        for each in (planned_spec(spec), spec)
    ]
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        torch.nn.init.normal_(parameters[0], std=0.2, generator=torch.Generator().manual_seed(0))
        parameters[1].data.copy_(parameters[0].data)
    return planned_positions(models[0]), models[1]


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Megatron asks for CUDA's device and its random numbers, of which none is drawn here."""
    from megatron.core import tensor_parallel

    tracker = SimpleNamespace(fork=lambda *_: nullcontext())
    with (
        mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
        mock.patch.object(tensor_parallel, "get_cuda_rng_tracker", return_value=tracker),
    ):
        yield
