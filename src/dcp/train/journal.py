"""What a job shows and leaves behind: a progress bar, and metrics by step."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dcp.train.config import JobConfig

METRICS = "metrics.jsonl"


class Journal:
    """The report folder and the progress bar of one job; the first rank keeps it.

    Args:
        first_step: what is known of it and later ones is forgotten.
        describe: what the bar says about a step, given its metrics.
    """

    def __init__(
        self, config: JobConfig, *, first_step: int, describe: Callable[[dict[str, Any]], str]
    ) -> None:
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        config.save(self.folder / "config.json")
        path = self.folder / METRICS
        draft = path.with_suffix(".partial")
        draft.write_text("".join(line + "\n" for line in _lines_before(first_step, path)))
        draft.replace(path)
        self._file = path.open("a")
        self._describe, self._bar = describe, _open_bar(config, first_step)

    def step(self, metrics: dict[str, Any]) -> None:
        """Write one step's figures and move the bar."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._bar is not None:
            self._bar.set_postfix_str(self._describe(metrics), refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()


def _lines_before(step: int, path: Path) -> list[str]:
    """Lines of earlier steps. One that cannot be read, as the last of a job that was killed may
    be, is forgotten: its step comes again, or the line was no metrics."""
    if step == 0 or not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return kept


def _open_bar(config: JobConfig, first_step: int) -> Any:
    if not config.progress:
        return None
    from tqdm import tqdm

    return tqdm(initial=first_step, total=config.steps, desc="train", unit="step", file=sys.stderr)
