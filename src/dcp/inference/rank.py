"""One rank of ``dcp generate``, started by :func:`dcp.launch.ranks.run_ranks` or by torchrun."""

from __future__ import annotations

from itertools import chain
from statistics import mean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dcp.data.tokenizers import Tokenizer, open_tokenizer
from dcp.inference.engine import InferenceEngine
from dcp.inference.model import open_model
from dcp.launch.group import choose_device, joined_group

SAMPLED = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def generate(job: dict[str, Any]) -> dict[str, Any] | None:
    """:func:`converse` in the group that the environment describes; None but on the first rank."""
    torch.set_num_threads(1)
    device = choose_device(job["device"])
    with joined_group(device) as group:
        found = converse(job, device, group)
        return found if dist.get_rank(group) == 0 else None


def meshes(device: torch.device, tensor_parallel: int) -> tuple[DeviceMesh, DeviceMesh]:
    """This rank's group of attention and its group of tensor parallelism, which are neighbours.

    Raises ``ValueError`` where ``tensor_parallel`` does not divide the ranks there are.
    """
    size = dist.get_world_size()
    if size % tensor_parallel:
        raise ValueError(f"tensor_parallel={tensor_parallel} does not divide {size} processes")
    shape = (size // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("attention", "tensor"))
    return mesh["attention"], mesh["tensor"]


def open_engine(
    job: dict[str, Any], device: torch.device, group: dist.ProcessGroup | DeviceMesh | None
) -> InferenceEngine:
    """The engine of a job's model, weights shared out where it says so."""
    tensor_group = None
    if job["tensor_parallel"] > 1:
        group, tensor_group = meshes(device, job["tensor_parallel"])
    model = open_model(
        job["model"],
        seed=job["seed"],
        dtype=job["dtype"],
        device=str(device),
        tensor_group=tensor_group,
    )
    return InferenceEngine(
        model,
        group=group,
        tensor_group=tensor_group,
        num_pages=job["num_pages"],
        page_size=job["page_size"],
        window_pages=job["window_pages"],
        strategy=job["strategy"],
    )


def converse(
    job: dict[str, Any],
    device: torch.device,
    group: dist.ProcessGroup | DeviceMesh | None,
) -> dict[str, Any]:
    """What ``dcp generate --json`` prints.

    ``tokens`` and ``text`` are all replies to each prompt; ``turns`` has them turn by turn.
    """
    engine = open_engine(job, device, group)
    model, tokenizer = engine.model, open_tokenizer(job["model"] or "bytes")
    options = {name: job[name] for name in SAMPLED}
    ends = model.config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    turns: list[list[list[int]]] = []
    seconds: list[list[float]] = []
    for texts in [job["prompt"], *([text] * len(job["prompt"]) for text in job["then"])]:
        prompts = {
            name: said(tokenizer, text, begin=model.config.bos_token_id, end=end, later=bool(turns))
            for name, text in enumerate(texts)
        }
        turns.append(list(engine.generate(prompts, end=end, **options).values()))
        seconds.append(engine.step_seconds)
    whole = [list(chain(*replies)) for replies in zip(*turns, strict=True)]
    decoding = list(chain(*(of[1:] for of in seconds)))
    return {
        "tokens": whole,
        "text": _texts(tokenizer, whole),
        "turns": [{"tokens": of, "text": _texts(tokenizer, of)} for of in turns],
        "first_token_seconds": seconds[0][0],
        "token_seconds": mean(decoding) if decoding else 0.0,
    }


def said(
    tokenizer: Tokenizer, text: str, *, begin: int | None, end: int | None, later: bool
) -> list[int]:
    """Tokens of what the user says: the model ends it, and only the first turn begins a text."""
    tokens = tokenizer.encode(text.encode()).tolist()
    if tokens and tokens[-1] == end:
        tokens.pop()
    return tokens[1:] if later and tokens and tokens[0] == begin else tokens


def _texts(tokenizer: Tokenizer, replies: list[list[int]]) -> list[str]:
    return [tokenizer.decode(np.array(reply, dtype=np.int64)) for reply in replies]
