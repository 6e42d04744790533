"""Samples of text and images: the ``modality`` mask from what a sample says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dcp.masks import AttnMask


@dataclass(frozen=True)
class ModalityMasks:
    """A ``mask_fn`` for samples that are mappings with ``text_lengths`` and ``image_size``.

    A sample's tokens are ``text_lengths[0]`` of text, an image of ``image_size`` tokens,
    ``text_lengths[1]`` of text, and so on to the last text; see :meth:`dcp.AttnMask.modality`. A
    sample without ``image_size`` is text alone, and causal.

    Args:
        image_sees_only_itself: an image token sees its image alone, else also all before it.

    Calling it raises ``ValueError`` where the lengths do not add up to the sequence; split
    documents have no such lengths, so batch with ``over_long="raise"``.
    """

    image_sees_only_itself: bool = False
    sample_keys: ClassVar = ("text_lengths", "image_size")  # which the loader leaves to it

    def __call__(self, seqlens: list[int], samples: Sequence[Any]) -> list[AttnMask]:
        return [self._mask(seqlen, samples[i]) for i, seqlen in enumerate(seqlens)]

    def _mask(self, seqlen: int, sample: Any) -> AttnMask:
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"a multimodal sample must be a mapping, got {type(sample).__name__} of "
                f"{seqlen} tokens; documents must not be split: set over_long='raise'"
            )
        if sample.get("image_size") is None:
            return AttnMask.causal(seqlen)
        if sample.get("text_lengths") is None:
            raise ValueError("a sample with 'image_size' needs 'text_lengths'")
        text_lengths = [int(length) for length in sample["text_lengths"]]
        mask = AttnMask.modality(
            text_lengths, int(sample["image_size"]), self.image_sees_only_itself
        )
        if mask.q_len != seqlen:
            raise ValueError(
                f"text_lengths {text_lengths} with images of {int(sample['image_size'])} tokens "
                f"make {mask.q_len} tokens, the sample has {seqlen}"
            )
        return mask
