"""A mask: which share of each cell's pairs counts, exactly, however long the sequence is."""

from __future__ import annotations

import numpy as np

from dcp.pictures.marks import box, shades, svg, text
from dcp.slices import cell_areas, slice_area

SIDE, LEFT, TOP = 288, 8, 18
_WORK = 2_000_000  # pairs of a slice and a cell that are measured, at most


def mask_html(bands: np.ndarray, q_len: int, k_len: int, *, num_segments: int) -> str:
    """What a notebook shows of :class:`dcp.AttnMask`."""
    area, pairs = int(slice_area(bands).sum()), q_len * k_len
    facts = [f"{q_len:,} queries × {k_len:,} keys", f"{area:,} pairs"]
    if pairs:
        facts.append(f"{100 * area / pairs:.3g}%")
    facts.append(f"{len(bands):,} slice{'s' * (len(bands) != 1)}")
    if num_segments > 1:
        facts.append(f"{num_segments:,} segments")
    if not pairs:
        return box("AttnMask", facts, "")
    share = mask_cells(bands, q_len, k_len)
    width, height = _sides(q_len, k_len)
    parts = [
        text(LEFT, TOP - 6, "keys →  queries ↓", faint=True),
        shades(share, (LEFT, TOP, width, height)),
        f'<rect x="{LEFT}" y="{TOP}" width="{width:g}" height="{height:g}" fill="none" '
        'stroke="currentColor" stroke-opacity=".35"/>',
    ]
    rows, columns = share.shape
    if rows < q_len or columns < k_len:
        cell = f"a cell is {q_len / rows:.4g} × {k_len / columns:.4g} pairs; paler is fewer"
        parts.append(text(LEFT, TOP + height + 14, cell, faint=True))
    return box("AttnMask", facts, svg(SIDE + 40, TOP + height + 20, parts, "pairs of the mask"))


def mask_cells(bands: np.ndarray, q_len: int, k_len: int) -> np.ndarray:
    """Share of pairs that count in each cell of a grid over the mask, float ``[rows, columns]``:
    one cell a pair where there is room for it."""
    cells = 256
    while True:
        q, k = (
            np.linspace(0, length, min(cells, length) + 1).astype(np.int64)
            for length in (q_len, k_len)
        )
        touched = 1.0  # cells that slices reach into, about
        for low, high, edges in ((0, 1, q), (2, 3, k)):
            size = (bands[:, high] - bands[:, low]) / edges[-1] * (len(edges) - 1)
            touched = touched * (size + 2)
        if np.sum(touched) <= _WORK or cells == 16:
            break
        cells //= 2
    share: np.ndarray = cell_areas(bands, q, k) / (np.diff(q)[:, None] * np.diff(k)[None, :])
    return share


def _sides(q_len: int, k_len: int) -> tuple[float, float]:
    """Width and height in pixels: true to the shape, but never a thread."""
    longest = max(q_len, k_len)
    return max(SIDE * k_len / longest, SIDE / 12), max(SIDE * q_len / longest, SIDE / 12)
