"""Tables of plain scalars: kept as CSV, and averaged."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]  # a case's settings, then what was found


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        width = len(reader.fieldnames or ())
        whole = [row for row in reader if None not in row and None not in row.values()]
    return [
        {name: _number(text) for name, text in row.items()} for row in whole if len(row) == width
    ]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows that have the same columns; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    return path


def mean_by(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str], values: Sequence[str]
) -> list[Row]:
    """Means of ``values`` over the rows that agree in ``keys``, in order of first appearance."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return [
        dict(zip(keys, group, strict=True))
        | {value: sum(row[value] for row in members) / len(members) for value in values}
        | {"batches": len(members)}
        for group, members in groups.items()
    ]


def mean_of(rows: Iterable[Mapping[str, Any]], value: str, **keys: object) -> float:
    """The mean of ``value`` over the rows that have these settings."""
    return mean(row[value] for row in rows if all(row[k] == v for k, v in keys.items()))


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
