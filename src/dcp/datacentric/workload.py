"""What is trained: three methods are all that data-centric training needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dcp.datacentric.buckets import Bucket
from dcp.datacentric.sequence_group import SequenceGroup


class TooFewTokens(ValueError):
    """A sample cannot be split over so many ranks; all of a group find that out alike."""


class Workload:
    """A model, and samples of many sizes. Write :meth:`sizes`, :meth:`loss` and :meth:`split`.

    All else follows from them, and may be overridden where more is known: how samples are loaded,
    how a loss is weighed, which layers may recompute. A model that takes the group itself, so that
    no rank ever has its whole output, overrides :meth:`summed_loss` in place of the last two.

    Args:
        model: with the same layers on every rank; the first rank's weights are used. None where
            :meth:`build` makes it.
        device: where it is trained.
        seed: of :meth:`generator`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.model: Any = model
        self.device, self.seed = torch.device(device), seed
        self._handles: Sequence[RemovableHandle] = ()

    # ------------------------------------------------------------------ the contract

    def sizes(self) -> Sequence[tuple[int, ...]]:
        """The size of every sample, in any unit: frames, rows and columns, or tokens.

        Samples of one size form a bucket: they may share a micro-batch, and cost the same.
        """
        raise NotImplementedError(f"{type(self).__name__} needs sizes(): of every sample")

    def loss(self, model: nn.Module, samples: Sequence[int], epoch: int) -> Tensor:
        """The sum of the losses of these samples, all of one size, as one process computes it.

        Every rank of a group calls it with the same samples and must draw the same noise:
        :meth:`generator` does. What it returns is divided by :meth:`weight` of the whole step.
        """
        raise NotImplementedError(f"{type(self).__name__} needs loss(): of samples of one size")

    def split(self, model: nn.Module, group: SequenceGroup) -> Sequence[RemovableHandle]:
        """Hooks that split the model's tokens over ``group`` and gather its output.

        They are removed after the backward pass; a group of one rank needs none.
        :func:`~dcp.datacentric.splitting.split_tokens` makes them from a plan.
        """
        raise NotImplementedError(f"{type(self).__name__} needs split(): of the model's tokens")

    # ------------------------------------------------------------------ what follows from it

    def generator(self, sample: int, epoch: int) -> torch.Generator:
        """Of the random numbers of a sample in an epoch (on the CPU), the same on every rank."""
        seed = np.random.default_rng([self.seed, sample, epoch]).integers(1 << 62)
        return torch.Generator().manual_seed(int(seed))

    @cached_property
    def buckets(self) -> list[Bucket]:
        """All there may be."""
        return [Bucket(_name(size), size) for size in sorted(set(self._sizes))]

    @cached_property
    def bucket_of(self) -> list[str]:
        """Name of each sample's bucket."""
        return [_name(size) for size in self._sizes]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a profile depends on, of the model."""
        weights = list(self.model.parameters())
        return {
            "kind": type(self.model).__name__,
            "num_weights": sum(weight.numel() for weight in weights),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "buckets": {bucket.name: list(bucket.shape) for bucket in self.buckets},
        }

    @cached_property
    def depth(self) -> dict[str, int]:
        """Layers of each kind."""
        return {kind: len(layers) for kind, layers in self.layers(self.model).items()}

    def build(self, depth: int | None = None) -> nn.Module:
        """The model; ``depth``: with that many layers of each kind, where it has kinds."""
        return self.model.to(self.device)

    def layers(self, model: nn.Module) -> dict[str, list[Any]]:
        """Its layers by kind; their ``gradient_checkpointing`` says whether they recompute.

        Without any, the whole model is profiled, and keeps all its activations.
        """
        return {}

    def load(self, samples: Sequence[int], epoch: int) -> Any:
        """A micro-batch of these samples, all of one bucket."""
        return samples, epoch

    def stand_in(self, bucket: Bucket, batch_size: int) -> Any:
        """A micro-batch of the bucket's full size, of any content."""
        return self.load([self.bucket_of.index(bucket.name)] * batch_size, 0)

    def summed_loss(self, model: nn.Module, batch: Any, group: SequenceGroup) -> Tensor:
        """This rank's part of the loss, summed over what :meth:`weight` counts.

        A sample of fewer tokens than ranks is computed whole by each of them.
        """
        try:
            return self._split_loss(model, batch, group)
        except TooFewTokens:
            return self._split_loss(model, batch, SequenceGroup(0, 1, 0)) / group.size

    def release(self) -> None:
        """After the backward pass of a micro-batch: the model is whole again."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def weight(self, samples: Sequence[int]) -> int:
        """What the loss is a mean over: samples, or tokens with a label."""
        return len(samples)

    def num_tokens(self, samples: Sequence[int]) -> int:
        """Tokens that go through the model, for the log."""
        return sum(prod(self._sizes[sample]) for sample in samples)

    @cached_property
    def _sizes(self) -> list[tuple[int, ...]]:
        return [tuple(size) for size in self.sizes()]

    def _split_loss(self, model: nn.Module, batch: Any, group: SequenceGroup) -> Tensor:
        self.release()  # where a micro-batch failed
        self._handles = self.split(model, group) if group.size > 1 else ()
        return self.loss(model, *batch) / group.size  # which every rank has, whole


def keep_activations_of(layers: dict[str, list[Any]], keep: dict[str, int]) -> None:
    """Let the first ``keep[kind]`` layers of each kind keep activations, the rest recompute."""
    for kind, members in layers.items():
        for number, layer in enumerate(members):
            layer.gradient_checkpointing = number >= keep.get(kind, 0)


def _name(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
