"""Buckets: samples of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np


@dataclass(frozen=True)
class Bucket:
    """Samples of one size.

    Attributes:
        name: unique, for people: ``"240p x 51"`` or ``"512 tokens"``.
        shape: latent frames, height and width; or the most tokens of a text.
    """

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of one sample, to order buckets by."""
        return prod(self.shape)


# Five resolutions and five frame counts, as the published comparison has them.
RESOLUTIONS = {  # pixels, height and width
    "144p": (144, 256),
    "240p": (240, 426),
    "360p": (360, 640),
    "480p": (480, 854),
    "720p": (720, 1280),
}
FRAMES = (1, 51, 102, 204, 408)
# Height over width, as Open-Sora 1.2 names them: 0.56 is 9:16.
ASPECT_RATIOS = (
    *("0.39", "0.42", "0.48", "0.50", "0.52", "0.56", "0.66", "0.75"),
    *("1.00", "1.33", "1.52", "1.78", "1.92", "2.00", "2.10"),
)
NEARLY = 0.8  # share of a resolution's pixels that a clip needs to be scaled up to it
DISTRIBUTIONS = ("short", "balanced", "long")  # of lengths, for draw_buckets


def video_buckets(*, pixels: int = 8, frames: int = 17) -> list[Bucket]:
    """All 25 buckets, with latents of ``pixels`` x ``pixels``, 5 per ``frames`` frames.

    The original's autoencoder is the default; larger numbers make a small model's latents.
    """
    return [
        Bucket(
            f"{name} x {count}",
            (max(count * 5 // frames, 1), -(-height // pixels), -(-width // pixels)),
        )
        for name, (height, width) in RESOLUTIONS.items()
        for count in FRAMES
    ]


@dataclass(frozen=True)
class PixelBucket:
    """What clips are scaled, cropped and cut to.

    Attributes:
        name: resolution, aspect ratio and frames: ``"240p 0.56 x 51"``.
        shape: frames, height and width in pixels.
    """

    name: str
    shape: tuple[int, int, int]


def pixel_bucket(
    shape: tuple[int, int, int],
    *,
    resolutions: Sequence[str] = tuple(RESOLUTIONS),
    frames: Sequence[int] = FRAMES,
    multiple: int = 1,
) -> PixelBucket:
    """The bucket of a clip, by Open-Sora's rule.

    The largest resolution of whose pixels the clip has :data:`NEARLY` all, the most frames that it
    has (1 is for images alone), the nearest aspect ratio.

    Args:
        shape: the clip's frames, height and width.
        resolutions, frames: those there are.
        multiple: what heights and widths are rounded to.

    Raises ``ValueError`` for a clip that is smaller or shorter than any.
    """
    count, height, width = shape
    areas = {name: prod(RESOLUTIONS[name]) for name in resolutions}
    fitting = [name for name, area in areas.items() if height * width >= NEARLY * area]
    lengths = [n for n in frames if (n == 1) == (count == 1) and n <= count]
    if not fitting or not lengths:
        raise ValueError(
            f"{count} frames of {height} x {width} fit no bucket: resolutions are "
            f"{', '.join(resolutions)}, frames {', '.join(map(str, frames))}"
        )
    resolution, length = max(fitting, key=lambda name: areas[name]), max(lengths)
    ratio = min(ASPECT_RATIOS, key=lambda name: abs(float(name) - height / width))
    tall = (areas[resolution] * float(ratio)) ** 0.5
    sides = (max(round(side / multiple), 1) * multiple for side in (tall, tall / float(ratio)))
    return PixelBucket(f"{resolution} {ratio} x {length}", (length, *sides))


def text_buckets(longest: int) -> list[Bucket]:
    """Powers of two from 64 tokens on, and the longest."""
    sizes = [64]
    while sizes[-1] * 2 < longest:
        sizes.append(sizes[-1] * 2)
    sizes = [size for size in sizes if size < longest] + [longest]
    return [Bucket(f"{size} tokens", (size,)) for size in sizes]


def draw_buckets(
    buckets: Sequence[Bucket], count: int, distribution: str, *, seed: int = 0
) -> list[Bucket]:
    """Buckets of ``count`` samples: mostly ``"short"``, mostly ``"long"`` or ``"balanced"``.

    The n-th bucket by size has a weight of ``(n + 5) ** -3``, from the shortest or the longest on;
    balanced is uniform.
    """
    ordered = sorted(buckets, key=lambda bucket: (bucket.size, bucket.name))
    place = np.arange(1, len(ordered) + 1)
    weights = {
        "short": (place + 5.0) ** -3,
        "balanced": np.ones(len(place)),
        "long": (place[::-1] + 5.0) ** -3,
    }[distribution]
    rng = np.random.default_rng(seed)
    drawn = rng.choice(len(ordered), size=count, p=weights / weights.sum())
    return [ordered[index] for index in drawn.tolist()]
