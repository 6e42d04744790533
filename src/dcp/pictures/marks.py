"""What pictures are made of: shades as one small PNG, rectangles as one path, figures as words."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape

import numpy as np

BLUE, ORANGE = (31, 119, 204), (224, 123, 20)  # told apart by every kind of eye, on white and black
_STYLE = "font:12px system-ui,sans-serif;line-height:1.5;max-width:760px"


def box(title: str, facts: Sequence[str], body: str) -> str:
    """A heading, facts beside it, and a picture under it."""
    return (
        f'<div style="{_STYLE}"><div><b>{escape(title)}</b>'
        f'<span style="opacity:.7"> {" · ".join(map(escape, facts))}</span></div>{body}</div>'
    )


def svg(width: int, height: float, parts: Sequence[str], label: str) -> str:
    """A picture that shrinks with a narrow page."""
    return (
        f'<svg viewBox="0 0 {width} {height:g}" width="{width}" role="img" '
        f'aria-label="{escape(label)}" style="max-width:100%;height:auto;margin-top:4px" '
        'font-family="system-ui,sans-serif" font-size="11" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", faint: bool = False) -> str:
    opacity = ' opacity=".65"' if faint else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{opacity}>{escape(words)}</text>'


def rectangles(rows: np.ndarray, colour: str, *, opacity: float = 1.0) -> str:
    """Rectangles (x, y, width, height), ``[n, 4]``, as one path."""
    path = "".join(f"M{x:.4g} {y:.4g}h{w:.3g}v{h:.3g}h-{w:.3g}" for x, y, w, h in rows.tolist())
    return f'<path d="{path}" fill="{colour}" fill-opacity="{opacity:g}"/>' if path else ""


def colour(rgb: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in rgb)


def shades(
    share: np.ndarray, place: tuple[float, float, float, float], kinds: np.ndarray | None = None
) -> str:
    """An image of cells at ``place`` (x, y, width, height): as opaque as their ``share`` in [0, 1],
    though any share is seen; of the second colour in rows of which ``kinds`` is 1."""
    share = np.clip(share, 0.0, 1.0)
    level = np.where(share > 0, np.ceil(32 + 95 * share), 0).astype(np.uint8)
    if kinds is not None:
        level += (128 * kinds[:, None]).astype(np.uint8)
    x, y, width, height = place
    data = b64encode(_png(level)).decode()
    return (
        f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
    )


def _png(index: np.ndarray) -> bytes:
    """A PNG with a palette: 128 shades of :data:`BLUE`, and 128 of :data:`ORANGE`."""
    height, width = index.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), index], axis=1)  # no filter
    alpha = np.round(np.arange(128) * 255 / 127).astype(np.uint8).tobytes()
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(BLUE) * 128 + bytes(ORANGE) * 128,
        b"tRNS": alpha * 2,
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )


def si(value: float, unit: str = "") -> str:
    """Three digits and a prefix: ``6.1 G``, with the unit behind it."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs" if value else "0 s"
