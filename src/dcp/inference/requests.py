"""What is asked of a server, what it says piece by piece, and how ranks hear of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dcp.checks import whole
from dcp.inference.inputs import Drawn, Sampling
from dcp.wire import exactly, pack, reading, record, unpack

MOST_LIKELIEST = 20  # log-probabilities told beside a token's own
MOST_STOPS = 16
_ORDERS = "serving orders"


@dataclass(frozen=True)
class Request:
    """A prompt to be continued once.

    Args:
        tokens: the prompt.
        stop: texts that end the reply; they are not part of it.
        stop_tokens: tokens that end the reply, and add nothing to its text.
        num_likeliest: see :class:`dcp.inference.draws.Part`.

    Raises ``ValueError`` for what cannot be asked of any model.
    """

    id: int
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    num_likeliest: int | None = None

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, least=1)
        if not self.tokens:
            raise ValueError("the prompt is empty: give at least one token")
        if self.num_likeliest is not None:
            whole("the number of log-probabilities", self.num_likeliest, most=MOST_LIKELIEST)
        if not all(self.stop) or len(self.stop) > MOST_STOPS:
            raise ValueError(
                f"stop must be at most {MOST_STOPS} texts, none of them empty, "
                f"got {list(self.stop)!r:.100}"
            )


@dataclass(frozen=True)
class Piece:
    """What a step adds to a reply.

    ``text`` may lag behind the tokens: a character is given when all of its tokens are there, and
    what may begin a stop text when it is seen not to.

    ``finish``: None while more is to come; ``"stop"``, ``"length"``, or ``"error"``, whose message
    is in ``error``, and which has no token.
    """

    id: int
    drawn: Drawn | None
    text: str = ""
    finish: str | None = None
    error: str = ""


@dataclass(frozen=True)
class Orders:
    """What changes before a step: who leaves, who joins; or that all is over."""

    leaves: tuple[int, ...] = ()
    joins: tuple[Request, ...] = ()
    ends: bool = False

    def __bool__(self) -> bool:
        return bool(self.leaves or self.joins or self.ends)


def pack_orders(orders: Orders) -> bytes:
    """A message for :func:`unpack_orders`."""
    requests = [asdict(request) for request in orders.joins]
    prompts = [request.pop("tokens") for request in requests]
    meta = {"leaves": orders.leaves, "joins": requests, "ends": orders.ends}
    arrays = {
        "length": np.array([len(prompt) for prompt in prompts], dtype=np.int64),
        "tokens": np.array([token for prompt in prompts for token in prompt], dtype=np.int64),
    }
    return pack(_ORDERS, meta, arrays)


def unpack_orders(message: bytes) -> Orders:
    """The orders of a message; :class:`dcp.wire.WireError` for anything else."""
    meta, arrays = unpack(_ORDERS, message)
    with reading(_ORDERS):
        exactly("orders", meta, ("leaves", "joins", "ends"))
        exactly("orders", arrays, ("length", "tokens"))
        ends = np.cumsum(arrays["length"])
        if len(ends) != len(meta["joins"]) or len(arrays["tokens"]) != (ends[-1:].sum()):
            raise ValueError(f"{len(ends)} prompts do not fit {len(meta['joins'])} requests")
        prompts = np.split(arrays["tokens"], ends[:-1])
        joins = [
            _read_request(fields, prompt.tolist())
            for fields, prompt in zip(meta["joins"], prompts[: len(ends)], strict=True)
        ]
        leaves = tuple(whole("leaves", each) for each in meta["leaves"])
        if type(meta["ends"]) is not bool:
            raise ValueError(f"ends is {meta['ends']!r}")
        return Orders(leaves, tuple(joins), meta["ends"])


def _read_request(fields: dict[str, Any], prompt: list[int]) -> Request:
    made = record(Request, fields | {"tokens": prompt})
    return replace(
        made,
        sampling=record(Sampling, fields["sampling"]),
        tokens=tuple(made.tokens),
        stop=tuple(made.stop),
        stop_tokens=tuple(made.stop_tokens),
    )
