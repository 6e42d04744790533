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
    """How a token is drawn from logits, see :meth:`dcp.inference.InferenceEngine.generate`."""

    temperature: float
    top_k: int | None
    seed: int

    def __post_init__(self) -> None:
        number("temperature", self.temperature)
        if self.top_k is not None:
            whole("top_k", self.top_k, least=1)
        whole("seed", self.seed)

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


def token_ids(name: str | int, prompt: Any, *, vocab_size: int) -> list[int]:
    """A prompt as a list: whole numbers of any library, each a token of the model."""
    what = f"conversation {name!r}: prompt"
    try:
        return whole_numbers(what, prompt, most=vocab_size - 1).tolist()
    except ValueError as error:
        raise ValueError(f"{error}; the model has tokens 0 to {vocab_size - 1}") from None
