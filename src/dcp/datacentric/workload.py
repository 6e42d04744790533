"""What is trained: the interface between data-centric execution and a kind of model and data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from dcp.datacentric.buckets import Bucket
from dcp.datacentric.sequence_group import SequenceGroup


class Workload(Protocol):
    """A model, and samples that come in buckets.

    Attributes:
        buckets: all there may be.
        bucket_of: name of each sample's bucket.
        identity: what a profile depends on, of the model.
        depth: layers of each kind.
    """

    buckets: list[Bucket]
    bucket_of: list[str]
    identity: dict[str, Any]
    depth: dict[str, int]

    def build(self, depth: int | None = None) -> nn.Module:
        """The model with seeded weights; ``depth``: with that many layers of each kind."""

    def layers(self, model: nn.Module) -> dict[str, list[Any]]:
        """Its layers by kind; their ``gradient_checkpointing`` says whether they recompute."""

    def load(self, samples: Sequence[int], epoch: int) -> Any:
        """A micro-batch of these samples, all of one bucket."""

    def stand_in(self, bucket: Bucket, batch_size: int) -> Any:
        """A micro-batch of the bucket's full size, of any content."""

    def summed_loss(self, model: nn.Module, batch: Any, group: SequenceGroup) -> Tensor:
        """This rank's part of the loss, summed over what :meth:`weight` counts."""

    def weight(self, samples: Sequence[int]) -> int:
        """What the loss is a mean over: samples, or tokens with a label."""

    def num_tokens(self, samples: Sequence[int]) -> int:
        """Tokens that go through the model."""


def keep_activations_of(layers: dict[str, list[Any]], keep: dict[str, int]) -> None:
    """Let the first ``keep[kind]`` layers of each kind keep activations, the rest recompute."""
    for kind, members in layers.items():
        for number, layer in enumerate(members):
            layer.gradient_checkpointing = number >= keep.get(kind, 0)
