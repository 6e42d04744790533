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
        kept = [] if first_step == 0 or not path.exists() else path.read_text().splitlines()
        kept = [line for line in kept if json.loads(line)["step"] < first_step]
        self._file = path.open("w")
        self._file.writelines(line + "\n" for line in kept)
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


def _open_bar(config: JobConfig, first_step: int) -> Any:
    if not config.progress:
        return None
    from tqdm import tqdm

    return tqdm(initial=first_step, total=config.steps, desc="train", unit="step", file=sys.stderr)
