"""What crosses between a training process and its planning workers, as checked messages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np

from dcp import wire
from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.errors import DCPError
from dcp.masks import AttnMask
from dcp.received import MOST, check_columns, check_weights, require, within
from dcp.slices import check_disjoint

REQUEST, ANSWER = "plan-request", "plan-answer"
_BATCH = ("seqlens", "which", "mask_length", "num_bands", "bands")


class PlanningFailed(ValueError):
    """The planner refused a batch; the message is the planner's own."""


class PlanningError(DCPError):
    """A batch has no plan, and not through the batch's own fault."""


class PoolLost(PlanningError):
    """A pool has ended and plans nothing more; another one may."""


def request_to_bytes(
    batch: SequenceBatch, spec: AttentionSpec, cluster: Cluster, options: dict[str, Any]
) -> bytes:
    """Ask for the plan of a batch; ``options`` are the keywords of ``dcp.plan``."""
    meta, arrays = batch_to_wire(batch)
    meta = {"batch": meta, "spec": asdict(spec), "cluster": cluster.to_json(), "options": options}
    return wire.pack(REQUEST, meta, arrays)


def request_from_bytes(
    message: bytes,
) -> tuple[SequenceBatch, AttentionSpec, Cluster, dict[str, Any]]:
    """The arguments of ``dcp.plan``."""
    meta, arrays = wire.unpack(REQUEST, message)
    with wire.reading(REQUEST):
        wire.exactly("the request", meta, ("batch", "spec", "cluster", "options"))
        spec, cluster = (
            wire.record(AttentionSpec, meta["spec"]),
            wire.record(Cluster, meta["cluster"]),
        )
        require(isinstance(meta["options"], dict), f"its options are {meta['options']!r:.100}")
        return batch_from_wire(meta["batch"], arrays), spec, cluster, meta["options"]


def answer_to_bytes(rank_plans: list[bytes]) -> bytes:
    """One planned batch: ``RankPlan.to_bytes()`` of each rank."""
    parts = {str(r): np.frombuffer(part, np.uint8) for r, part in enumerate(rank_plans)}
    return wire.pack(ANSWER, {}, parts)


def refusal_to_bytes(error: str) -> bytes:
    """The planner's error in place of a plan."""
    return wire.pack(ANSWER, {"error": error}, {})


def answer_from_bytes(message: bytes) -> list[bytes]:
    """``RankPlan.to_bytes()`` of each rank; :class:`PlanningFailed` for a refusal."""
    meta, parts = wire.unpack(ANSWER, message)
    with wire.reading(ANSWER):
        wire.exactly("the answer", meta, ["error"] if meta else [])
        wire.exactly("the answer", parts, [] if meta else map(str, range(max(len(parts), 1))))
        plain = all(part.dtype == np.uint8 and part.ndim == 1 for part in parts.values())
        require(plain, "plans are not bytes")
        require(isinstance(meta.get("error", ""), str), f"its error is {meta.get('error')!r:.100}")
    if meta:
        raise PlanningFailed(meta["error"])
    return [parts[str(rank)].tobytes() for rank in range(len(parts))]


def batch_to_wire(batch: SequenceBatch) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A batch as JSON-able values and arrays; a mask shared by sequences is sent once."""
    number: dict[int, int] = {}
    distinct: list[AttnMask] = []
    which = []
    for name in batch.mask_names:
        for mask in batch.masks[name]:
            if id(mask) not in number:
                number[id(mask)] = len(distinct)
                distinct.append(mask)
            which.append(number[id(mask)])
    bands = [mask.bands for mask in distinct] or [np.zeros((0, 6), dtype=np.int64)]
    return {"weights": batch.weights}, {
        "seqlens": batch.seqlens,
        "which": np.array(which, dtype=np.int64),
        "mask_length": np.array([mask.q_len for mask in distinct], dtype=np.int64),
        "num_bands": np.array([len(mask.bands) for mask in distinct], dtype=np.int64),
        "bands": np.concatenate(bands),
    }


def batch_from_wire(meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> SequenceBatch:
    """The batch that :func:`batch_to_wire` took apart."""
    wire.exactly("the batch", meta, ["weights"])
    wire.exactly("the batch", arrays, _BATCH)
    seqlens, which, lengths, num_bands, bands = (arrays[name] for name in _BATCH)
    names, count = list(meta["weights"]), len(seqlens)
    check_weights(meta["weights"], dict.fromkeys(names))
    check_columns(("mask_length", "num_bands"), lengths, num_bands)
    check_columns(("seqlens",), seqlens)
    require(bands.shape == (int(num_bands.sum()), 6), f"bands have shape {bands.shape}")
    require(within(which, 0, len(lengths)), "sequences name other masks")
    pieces = np.split(bands, np.cumsum(num_bands)[:-1])
    distinct = [_mask(n, of) for n, of in zip(lengths.tolist(), pieces, strict=False)]
    rows = which.reshape(len(names), count).tolist()
    masks = {name: [distinct[i] for i in row] for name, row in zip(names, rows, strict=True)}
    return SequenceBatch(seqlens.tolist(), masks, weights=meta["weights"])


def _mask(length: int, bands: np.ndarray) -> AttnMask:
    """A mask whose slices lie inside it, one beside the other."""
    require(within(bands[:, :4], 0, length + 1), f"slices reach beyond {length} tokens")
    require(within(bands[:, 4:], -MOST, MOST), "slices have bands out of range")
    check_disjoint(bands)
    return AttnMask(length, length, bands)


def write_message(stream: BinaryIO, message: bytes) -> None:
    """Send one message, its length first."""
    stream.write(len(message).to_bytes(8, "little"))
    stream.write(message)
    stream.flush()


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message; None where the stream ended, in the middle of one or not."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    size = int.from_bytes(head, "little")
    message = stream.read(size)
    return message if len(message) == size else None
