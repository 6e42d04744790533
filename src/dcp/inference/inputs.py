"""What a user asks of a model: tokens and how to sample, checked before anything happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcp.checks import number, whole, whole_numbers
from dcp.errors import DCPError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Args:
        temperature: 0 takes the likeliest token.
        top_k: draw from the likeliest ones only.
        top_p: draw from the fewest, likeliest first, whose probabilities sum up to it.
        seed, stream: a token drawn depends on both and on its position; conversations of one seed
            differ in their stream.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0

    def __post_init__(self) -> None:
        number("temperature", self.temperature)
        if self.top_k is not None:
            whole("top_k", self.top_k, least=1)
        if number("top_p", self.top_p) > 1:
            raise ValueError(f"top_p must be 1 or less, got {self.top_p!r}")
        whole("seed", self.seed)

    def draw(self, logits: Tensor, position: int) -> int:
        """The token at a position of its conversation."""
        if not torch.isfinite(logits).all():
            raise DCPError(
                "the model's logits are not finite: use another dtype, or check its weights"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        scores = logits.double().cpu().numpy()
        with np.errstate(over="ignore"):  # to -inf, which is never drawn
            scores = (scores - scores.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < np.partition(scores, -self.top_k)[-self.top_k]] = -np.inf
        weights = np.exp(scores)
        if self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            total = np.cumsum(weights[order])
            weights[order[np.searchsorted(total, self.top_p * total[-1]) + 1 :]] = 0
        total = np.cumsum(weights)
        random = np.random.default_rng([self.seed, self.stream, position])
        return int(np.searchsorted(total, random.random() * total[-1], side="right"))


@dataclass(frozen=True)
class Drawn:
    """A token, and how likely the model thought it and others, where that was asked for.

    Log-probabilities are the model's own, before temperature, top_k and top_p.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def token_ids(name: str | int, prompt: Any, *, vocab_size: int) -> list[int]:
    """A prompt as a list: whole numbers of any library, each a token of the model."""
    what = f"conversation {name!r}: prompt"
    try:
        return whole_numbers(what, prompt, most=vocab_size - 1).tolist()
    except ValueError as error:
        raise ValueError(f"{error}; the model has tokens 0 to {vocab_size - 1}") from None
