"""Where an artifact's files lie, and the batches that its experiments share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dcp.bench.conditions import conditions
from lab import CHECKOUT
from lab.paper.campaign import Measure, Task, run_tasks
from lab.paper.lengths import DATASETS, Lengths, document_lengths, make_batches
from lab.paper.rows import Row, read_rows

SHAPED = CHECKOUT / "benchmarks" / "results" / "attention.json"
SCALES = (0.5, 1, 2, 4)
MASKS = ("causal", "streaming", "causal_blockwise", "shared_question")


@dataclass
class Workbench:
    """One output folder and how much of everything is run.

    Attributes:
        out: figures go here, rows under ``data/``.
        effort: multiplies the number of batches of every experiment; 1 is what the defaults mean.
        files: folder with local lengths or documents, see :mod:`lab.paper.lengths`.
        over_long: what documents beyond a batch's longest do: drop, truncate or split.
        workers: processes of a simulated experiment, one a core by default.
        shaped: what ``python -m lab attention`` measured.
        configs: best configurations of the end-to-end figures; searched for by default.
    """

    out: Path
    effort: float = 1.0
    files: Path | None = None
    tokenizer: str | None = None
    over_long: str = "drop"
    workers: int | None = None
    configs: Path | None = None
    shaped: Path = SHAPED
    _batches: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.out / "data"

    @cached_property
    def lengths(self) -> dict[str, Lengths]:
        """Of every data set, read or drawn once."""
        return {
            name: document_lengths(name, self.data, files=self.files, tokenizer=self.tokenizer)
            for name in DATASETS
        }

    def count(self, batches: int) -> int:
        """So many batches, by effort; at least 1."""
        return max(round(batches * self.effort), 1)

    def batches(
        self, data: str, *, tokens: int, count: int, scale: float = 1, max_seqlen: int | None = None
    ) -> list[list[int]]:
        """The first ``count`` batches of a data set; all that was used is kept as JSON."""
        name = f"{data} x{scale:g}, {tokens} tokens, longest {max_seqlen or tokens}"
        if len(self._batches.get(name, ())) < count:
            self._batches[name] = make_batches(
                self.lengths[data],
                scale=scale,
                tokens=tokens,
                count=count,
                max_seqlen=max_seqlen,
                over_long=self.over_long,
            )
        return self._batches[name][:count]

    def run(self, name: str, tasks: list[Task], measure: Measure) -> list[Row]:
        """Rows of ``data/NAME.csv``: see :func:`lab.paper.campaign.run_tasks`."""
        path = self.data / f"{name}.csv"
        rows = run_tasks(path, tasks, measure, workers=self.workers, label=name)
        self._keep(name)
        return rows

    def rows(self, name: str) -> list[Row]:
        """What ``data/NAME.csv`` holds already."""
        return read_rows(self.data / f"{name}.csv")

    def label(self, data: str) -> str:
        """Origin of the lengths, a column of every row made from them."""
        return self.lengths[data].source

    def _keep(self, name: str) -> None:
        """Keep what the rows were made on and the lengths of every batch."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / f"{name}.json").write_text(json.dumps(conditions(), indent=1) + "\n")
        path = self.data / "batches.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        for title, batches in self._batches.items():
            if len(kept.get(title, ())) < len(batches):
                kept[title] = batches
        path.write_text(json.dumps(kept) + "\n")
