"""Training data that needs no download: synthetic latents, and rendered clips pooled to latents.

Both have a text that says what moves where, so that there is something to learn from it.
"""

from __future__ import annotations

import numpy as np

SOURCES = ("synthetic", "rendered")
CHANNELS, WORDS, TEXT_SIZE = 4, 4, 16
RENDERED_PIXELS, RENDERED_FRAMES = 4, 3  # of a rendered clip, each way, that one latent pools


def synthetic_latents(
    shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Plane waves: latents ``[channels, *shape]`` and text ``[words, text size]``.

    Args:
        shape: frames, rows and columns.
    """
    waves = rng.uniform(-1, 1, (CHANNELS, 5))  # rate in time and both directions, phase, height
    at = np.meshgrid(*(np.arange(n) / max(n, 2) for n in shape), indexing="ij")
    rates = waves[:, :3] * np.array([2.0, 3.0, 3.0])
    phase = np.tensordot(rates, np.stack(at), axes=1) + waves[:, 3, None, None, None]
    latents = np.sin(2 * np.pi * phase) * (1 + waves[:, 4, None, None, None])
    return latents.astype(np.float32), _text(waves)


def rendered_latents(
    shape: tuple[int, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A clip of coloured discs that drift and bounce, its pixels averaged to latents.

    Red, green and blue become three channels, the spread of brightness inside a cell the fourth.
    """
    discs = rng.uniform(-1, 1, (WORDS, 8))  # place, speed, radius and colour of each
    frames, rows, columns = (
        n * by
        for n, by in zip(shape, (RENDERED_FRAMES, RENDERED_PIXELS, RENDERED_PIXELS), strict=True)
    )
    clip = np.stack([_frame(discs, time, rows, columns) for time in range(frames)])
    return pooled_latents(clip, frames=RENDERED_FRAMES, pixels=RENDERED_PIXELS), _text(discs)


def pooled_latents(clip: np.ndarray, *, frames: int, pixels: int) -> np.ndarray:
    """Latents ``[4, frames, rows, columns]`` of pixels ``[frames, height, width, 3]`` in 0..1.

    No autoencoder: red, green and blue are averaged over cells of ``frames`` x ``pixels`` x
    ``pixels``; the spread of brightness inside a cell is the fourth channel.
    """
    count, height, width, _ = clip.shape
    shape = (count // frames, frames, height // pixels, pixels, width // pixels, pixels, 3)
    cells = clip.reshape(shape)
    colour = cells.mean(axis=(1, 3, 5))
    spread = cells.mean(axis=-1).std(axis=(1, 3, 5))
    latents = np.concatenate([2 * colour - 1, 4 * spread[..., None]], axis=-1)
    return latents.transpose(3, 0, 1, 2).astype(np.float32)


def _frame(discs: np.ndarray, time: int, rows: int, columns: int) -> np.ndarray:
    """``[rows, columns, 3]`` in 0..1."""
    y, x = np.mgrid[0:rows, 0:columns] / max(rows, columns)
    frame = np.full((rows, columns, 3), 0.1)
    for disc in discs:
        travelled = (disc[:2] + 1) / 2 + 0.02 * time * disc[2:4]
        centre = 1 - np.abs(travelled % 2 - 1)  # bounces between 0 and 1
        radius = 0.08 + 0.08 * (disc[4] + 1)
        height, width = rows / max(rows, columns), columns / max(rows, columns)
        inside = (y - centre[0] * height) ** 2 + (x - centre[1] * width) ** 2 < radius**2
        frame[inside] = (disc[5:8] + 1) / 2
    return frame


def _text(parameters: np.ndarray) -> np.ndarray:
    """One word for each row of parameters: its numbers and their sines."""
    text = np.zeros((WORDS, TEXT_SIZE), dtype=np.float32)
    text[:, : parameters.shape[1]] = parameters
    text[:, 8 : 8 + parameters.shape[1]] = np.sin(np.pi * parameters)
    return text
