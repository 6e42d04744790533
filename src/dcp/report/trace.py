"""Chrome / Perfetto traces of what a plan would do, or of what a run really did."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dcp.plans import Plan
from dcp.simulate import COMPUTE, TRANSFER, PassTimeline, Span, simulate


def simulated_spans(plan: Plan) -> list[Span]:
    """Every mask's forward pass and then its backward pass, as the simulator sees them."""
    timeline = simulate(plan, plan.cluster)
    spans: list[Span] = []
    begin = 0.0
    for label, passes in (("forward", timeline.forward), ("backward", timeline.backward)):
        for mask, played in passes.items():
            spans += _pass_spans(played, f"{mask} {label}", begin)
            begin += played.seconds
    return spans


def _pass_spans(played: PassTimeline, label: str, begin: float) -> Iterable[Span]:
    num_steps, num_ranks = played.begin.shape
    for rank in range(num_ranks):
        for step in range(num_steps):
            start = played.begin[step, rank]
            for track, what, end in (
                (COMPUTE, "division", played.computed[step, rank]),
                (TRANSFER, "communication", played.arrived[step, rank]),
            ):
                if end > start:
                    number = step if track == COMPUTE else step + 1
                    name = f"{label}: {what} {number}"
                    yield Span(rank, track, name, begin + start, begin + end)


def write_trace(spans: Iterable[Span], path: str | Path) -> None:
    """Write spans as a JSON trace that chrome://tracing and ui.perfetto.dev open."""
    events: list[dict[str, Any]] = []
    tracks: dict[tuple[int, str], int] = {}
    for span in spans:
        track = tracks.setdefault((span.rank, span.track), len(tracks))
        events.append(
            {
                "name": span.name,
                "ph": "X",
                "pid": span.rank,
                "tid": track,
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
            }
        )
    for (rank, name), track in tracks.items():
        named = {"ph": "M", "pid": rank}
        events.append(named | {"name": "process_name", "args": {"name": f"rank {rank}"}})
        events.append(named | {"tid": track, "name": "thread_name", "args": {"name": name}})
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
