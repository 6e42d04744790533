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

REQUEST, ANSWER = "plan-request", "plan-answer"


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
    meta = {"batch": meta, "spec": asdict(spec), "cluster": asdict(cluster), "options": options}
    return wire.pack(REQUEST, meta, arrays)


def request_from_bytes(
    message: bytes,
) -> tuple[SequenceBatch, AttentionSpec, Cluster, dict[str, Any]]:
    """The arguments of ``dcp.plan``."""
    meta, arrays = wire.unpack(REQUEST, message)
    spec, cluster = AttentionSpec(**meta["spec"]), Cluster(**meta["cluster"])
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
    if "error" in meta:
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
    pieces = np.split(arrays["bands"], np.cumsum(arrays["num_bands"])[:-1])
    lengths = arrays["mask_length"].tolist()
    distinct = [AttnMask(n, n, bands) for n, bands in zip(lengths, pieces, strict=False)]
    names, count = list(meta["weights"]), len(arrays["seqlens"])
    which = arrays["which"].reshape(len(names), count).tolist()
    masks = {name: [distinct[i] for i in row] for name, row in zip(names, which, strict=True)}
    return SequenceBatch(arrays["seqlens"].tolist(), masks, weights=meta["weights"])


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
