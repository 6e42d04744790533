"""A plan and its timeline: ranks × blocks, what each rank carries, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dcp.pictures.marks import BLUE, ORANGE, box, colour, rectangles, seconds, shades, si, svg, text

WIDTH, LEFT = 740, 30
MOST_RANKS = 64  # that get a row; of more, evenly chosen ones are shown
_COLUMNS = 360  # of the picture of blocks


def shown_ranks(num_ranks: int, num_steps: int = 1) -> np.ndarray:
    """Ranks that get a row, fewer of them where each has many steps to draw."""
    count = min(num_ranks, MOST_RANKS, max(2000 // max(num_steps, 1), 16))
    return np.unique(np.linspace(0, num_ranks - 1, count).round().astype(int))


def _row_height(num_rows: int) -> float:
    return float(np.clip(360 / num_rows, 6, 16))


def _labels(ranks: np.ndarray, top: float, height: float) -> list[str]:
    every = int(np.ceil(12 / height))
    return [
        text(LEFT - 5, top + (row + 0.5) * height + 4, str(rank), anchor="end", faint=True)
        for row, rank in enumerate(ranks.tolist())
        if row % every == 0
    ]


def plan_html(
    stats: Mapping[str, Any],
    *,
    num_sequences: int,
    token: np.ndarray,
    length: np.ndarray,
    owner: np.ndarray,
    pairs: np.ndarray,
    rank_tokens: np.ndarray,
    received: np.ndarray,
) -> str:
    """What a notebook shows of :class:`dcp.Plan`: ranks down, tokens of the batch to the right,
    what each rank computes and owns; then bars of what it carries.

    Args:
        stats: figures of the plan, see :class:`dcp.stats.Stats`.
        token, length, owner: first token, tokens and owner of the data blocks that have queries.
        pairs: computed, by rank and block of queries, ``[num_ranks, num_blocks]``.
        rank_tokens: of each rank.
        received: bytes by rank, from its own node and from others, ``[2, num_ranks]``.
    """
    num_ranks = len(rank_tokens)
    facts = [
        f"{stats['num_tokens']:,} tokens in {num_sequences} documents on {num_ranks} ranks",
        f"balance {stats['compute_balance']:.3f} compute, {stats['token_balance']:.3f} tokens",
        f"{si(stats['inter_node_bytes'], 'B')} between nodes, "
        f"{si(stats['intra_node_bytes'], 'B')} inside",
        f"{stats['num_compute_blocks']:,} compute blocks in {stats['num_divisions']} divisions",
    ]
    if limit := stats["limit_seconds"]:
        layer = stats["layer_seconds"]
        facts.append(f"a layer takes {seconds(layer)}, {layer / limit:.3f} × its limit")
    if num_ranks > MOST_RANKS:
        facts.append(f"{MOST_RANKS} of {num_ranks} ranks shown")
    picture = _rank_picture(token, length, owner, pairs, rank_tokens, received)
    return box(f"Plan, {stats['strategy']}", facts, picture)


def _rank_picture(
    block_token: np.ndarray,
    block_length: np.ndarray,
    owner: np.ndarray,
    computed: np.ndarray,
    tokens: np.ndarray,
    received: np.ndarray,
) -> str:
    ranks = shown_ranks(len(tokens))
    height, top, wide = _row_height(len(ranks)), 20.0, 380.0
    columns = min(_COLUMNS, max(int(block_length.sum()), 1))
    work = _spread(computed[ranks], block_token, block_length, columns)
    owns = _spread((owner == ranks[:, None]) * block_length, block_token, block_length, columns)
    per_column = max(block_length.sum() / columns, 1e-9)
    # three lines of pixels a rank: two of what it computes, one of what it owns
    share = np.stack([work / max(work.max(initial=0), 1e-9)] * 2 + [owns / per_column], axis=1)
    kinds = np.tile([0, 0, 1], len(ranks))
    bottom = top + len(ranks) * height
    parts = [
        *_labels(ranks, top, height),
        text(LEFT, 12, "computes (blue), owns (orange): tokens of the batch →", faint=True),
        shades(share.reshape(-1, columns), (LEFT, top, wide, bottom - top), kinds),
        f'<rect x="{LEFT}" y="{top:g}" width="{wide:g}" height="{bottom - top:g}" fill="none" '
        'stroke="currentColor" stroke-opacity=".35"/>',
    ]
    bars = (
        ("pairs", computed.sum(axis=1)[None], BLUE, si(computed.sum(axis=1).max(initial=0))),
        ("tokens", tokens[None], ORANGE, f"{int(tokens.max(initial=0)):,}"),
        ("received", received, BLUE, si(received.sum(axis=0).max(initial=0), "B")),
    )
    for index, (name, values, rgb, most) in enumerate(bars):
        left = LEFT + wide + 14 + 106 * index
        parts += [text(left, 12, f"{name} ≤ {most}", faint=True)]
        parts += _bars(values, ranks, rgb, left, top, height)
    return svg(WIDTH, bottom + 4, parts, "what every rank computes, owns and receives")


def _bars(
    values: np.ndarray,
    ranks: np.ndarray,
    rgb: tuple[int, int, int],
    left: float,
    top: float,
    height: float,
) -> list[str]:
    """Bars of the shown ranks with a line at the mean of all; later rows of values are solid."""
    total = values.sum(axis=0)
    scale = 90 / max(total.max(initial=0), 1e-9)
    y = top + np.arange(len(ranks)) * height + 1
    parts = []
    layers = [(total, 1.0 if len(values) == 1 else 0.45), *((part, 1.0) for part in values[1:])]
    for part, opacity in layers:
        size = part[ranks] * scale
        columns = [np.full_like(size, left), y, size, np.full_like(size, height - 2)]
        rows = np.stack(columns, axis=1)[size > 0]
        parts.append(rectangles(rows, colour(rgb), opacity=opacity))
    mean = left + total.mean() * scale
    line = f'<path d="M{mean:.4g} {top - 3:g}V{top + len(ranks) * height + 2:g}"'
    return [*parts, f'{line} stroke="currentColor" stroke-width="1.2"/>' if total.any() else ""]


def _spread(values: np.ndarray, token: np.ndarray, length: np.ndarray, columns: int) -> np.ndarray:
    """Values of blocks ``[rows, blocks]`` as columns of equally many tokens ``[rows, columns]``: a
    block's value is spread evenly over its tokens."""
    order = np.argsort(token, kind="stable")
    begin, size, values = token[order], length[order], values[:, order]
    edges = np.linspace(0, size.sum(), columns + 1)
    # the sum up to a token, linear inside a block
    ends = np.concatenate([begin, [size.sum()]])
    total = np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)
    return np.stack([np.diff(np.interp(edges, ends, row)) for row in total])


def pass_picture(
    name: str, begin: np.ndarray, computed: np.ndarray, arrived: np.ndarray, limit: float
) -> str:
    """Steps of every rank: arrays ``[steps, ranks]`` in seconds, ``limit`` at the right edge."""
    ranks = shown_ranks(begin.shape[1], len(begin))
    height, top = _row_height(len(ranks)), 20.0
    scale = (WIDTH - LEFT - 4) / (limit or 1.0)
    last = seconds(float(np.maximum(computed, arrived).max(initial=0)))
    parts = [*_labels(ranks, top, height), text(LEFT, 12, f"{name}: {last}", faint=True)]
    for until, offset, tall, fill, opacity in (
        (arrived, 0.68, 0.26, "currentColor", 0.35),
        (computed, 0.04, 0.6, colour(BLUE), 1.0),
    ):
        row, start, end = _bars_of(begin[:, ranks] * scale, until[:, ranks] * scale)
        size = end - start
        size -= np.where(size > 3, 0.7, 0.0)  # between a step and the next
        bars = [LEFT + start, top + (row + offset) * height, size, np.full(len(row), tall * height)]
        parts.append(rectangles(np.stack(bars, axis=1), fill, opacity=opacity))
    return svg(WIDTH, top + len(ranks) * height + 4, parts, f"steps of every rank, {name}")


def _bars_of(begin: np.ndarray, until: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank, begin and end of every step that takes time, of arrays ``[steps, ranks]`` in pixels;
    steps too narrow to be told apart are one bar."""
    row, step = np.nonzero((until > begin).T)
    start, end = begin[step, row], until[step, row]
    apart = np.ones(len(row), dtype=bool)
    apart[1:] = (row[1:] != row[:-1]) | (start[1:] - end[:-1] > 0.8) | (end - start > 3)[1:]
    first = np.flatnonzero(apart)
    return row[first], start[first], np.maximum.reduceat(end, first) if len(first) else end


def timeline_html(
    passes: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    *,
    forward_seconds: float,
    backward_seconds: float,
    exposed_comm_seconds: float,
) -> str:
    """What a notebook shows of :class:`dcp.simulate.Timeline`: begin, computed, arrived by pass."""
    ends = [float(np.max(of, initial=0)) for times in passes.values() for of in times[1:]]
    limit = max(ends, default=0.0)
    facts = [
        f"forward {seconds(forward_seconds)}, of which {seconds(exposed_comm_seconds)} is waiting",
        f"backward {seconds(backward_seconds)}",
        "blue: attention; grey: transfers under way",
    ]
    for steps, ranks in sorted({times[0].shape for times in passes.values()}):
        if (shown := len(shown_ranks(ranks, steps))) < ranks:
            facts.append(f"{shown} of {ranks} ranks shown")
            break
    body = "".join(pass_picture(name, *times, limit) for name, times in passes.items())
    return box("Timeline, predicted", facts, body)
