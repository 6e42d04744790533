"""What a user asks of a model: tokens and how to sample, checked before anything happens."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.errors import DCPError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, see :meth:`dcp.inference.InferenceEngine.generate`."""

    temperature: float
    top_k: int | None
    seed: int

    def __post_init__(self) -> None:
        warmth = self.temperature
        if isinstance(warmth, bool) or not isinstance(warmth, int | float) or not 0 <= warmth < inf:
            raise ValueError(f"temperature must be a number, 0 or more, got {warmth!r}")
        if self.top_k is not None:
            whole_number("top_k", self.top_k, least=1)
        whole_number("seed", self.seed, least=0)

    def draw(self, logits: Tensor, slot: int, position: int) -> int:
        """The token at a position of the conversation in a slot."""
        if not torch.isfinite(logits).all():
            raise DCPError("the model's logits are not finite: its weights or dtype cannot be used")
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.double().cpu().numpy()
        with np.errstate(over="ignore"):  # to -inf, which is never drawn
            scores = (scores - scores.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        total = np.cumsum(np.exp(scores))
        random = np.random.default_rng([self.seed, slot, position])
        return int(np.searchsorted(total, random.random() * total[-1], side="right"))


def whole_number(name: str, value: Any, *, least: int) -> int:
    """An integer that is ``least`` or more, and fits 63 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
        raise ValueError(f"{name} must be {least} or more, an integer, got {value!r:.100}")
    return value


def token_ids(name: str | int, prompt: Any, vocab_size: int) -> list[int]:
    """A prompt as a list: integers of any library, one dimension, each a token of the model."""
    what = f"the prompt of conversation {name!r}"
    if isinstance(prompt, Tensor):
        prompt = prompt.detach().cpu().numpy()
    if isinstance(prompt, str | bytes) or not hasattr(prompt, "__len__"):
        raise ValueError(f"{what} must be token ids, got {prompt!r:.100}")
    if not isinstance(prompt, np.ndarray):
        odd = {type(each) for each in prompt} - {int}
        if bad := [kind.__name__ for kind in odd if not issubclass(kind, np.integer)]:
            raise ValueError(f"{what} must be integers, got {bad[0]}: {prompt!r:.100}")
    ids = np.asarray(prompt) if len(prompt) else np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{what} must be one row of integers, got {ids.dtype} {prompt!r:.100}")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        raise ValueError(
            f"{what} has token {ids[outside][0]}, the model has tokens 0 to {vocab_size - 1}"
        )
    return ids.tolist()
