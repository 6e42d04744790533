"""Many cases, all cores, one CSV: what was run is not run again."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lab.paper.rows import Row, read_rows, write_rows

Task = tuple[Row, list[int]]  # a case's settings and the tokens of each of its documents
Measure = Callable[[Row, list[int]], Row]  # of these, what was found


def run_tasks(
    path: Path,
    tasks: Sequence[Task],
    measure: Measure,
    *,
    workers: int | None = None,
    label: str = "",
) -> list[Row]:
    """The rows of ``tasks``, in their order; those that ``path`` holds already are not run again.

    Every finished row is written at once, so that a run which was cut short goes on where it was.

    Args:
        measure: a function of a module's top level: settings and seqlens to figures.
        workers: processes, by default one a core; 0 runs everything in this one.
        label: of the progress bar.
    """
    keys = list(tasks[0][0]) if tasks else []
    known = {_key(row, keys): row for row in read_rows(path)}
    missing = [task for task in tasks if _key(task[0], keys) not in known]
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        _rewrite(path, list(known.values()))  # without a last line that was cut short
        for row in progress(_measured(missing, measure, workers), len(missing), label):
            _append(path, row)
            known[_key(row, keys)] = row
    return [known[_key(settings, keys)] for settings, _ in tasks]


def progress(items: Iterable[Row], total: int, label: str) -> Iterator[Row]:
    """The items, under a progress bar where tqdm is installed, else a line each tenth."""
    try:
        from tqdm import tqdm
    except ImportError:
        for done, item in enumerate(items, start=1):
            if done * 10 // total > (done - 1) * 10 // total:
                print(f"{label}: {done} of {total}", file=sys.stderr)
            yield item
        return
    yield from tqdm(items, total=total, desc=label, file=sys.stderr, mininterval=0.5)


def _measured(tasks: list[Task], measure: Measure, workers: int | None) -> Iterator[Row]:
    work = partial(_run, measure)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers == 0 or len(tasks) == 1:
        yield from map(work, tasks)
        return
    # spawn: a fork would copy the partitioner's threads without running them. The pool pickles rows
    # between this process and its own children; what is kept and read again is CSV.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, tasks, chunksize=4)


def _run(measure: Measure, task: Task) -> Row:
    settings, seqlens = task
    return settings | measure(settings, seqlens)


def _key(row: Row, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row.get(key)) for key in keys)


def _append(path: Path, row: Row) -> None:
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def _rewrite(path: Path, rows: list[Row]) -> None:
    if rows:
        draft = path.with_suffix(".draft")
        write_rows(draft, rows).replace(path)
    else:
        path.unlink(missing_ok=True)
