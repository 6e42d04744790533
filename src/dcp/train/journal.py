"""What a job shows and leaves behind: a progress bar, metrics by step, a picture of a plan."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dcp.plans import Plan
from dcp.train.config import TrainConfig

METRICS, PLAN_PAGE = "metrics.jsonl", "plan.html"


class Journal:
    """The report folder and the progress bar of one job; the first rank keeps it."""

    def __init__(self, config: TrainConfig, *, first_step: int) -> None:
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        config.save(self.folder / "config.json")
        path = self.folder / METRICS
        kept = [] if first_step == 0 or not path.exists() else path.read_text().splitlines()
        kept = [line for line in kept if json.loads(line)["step"] < first_step]
        self._file = path.open("w")
        self._file.writelines(line + "\n" for line in kept)
        self._bar: Any = None
        if config.progress:
            from tqdm import tqdm

            self._bar = tqdm(
                initial=first_step, total=config.steps, desc="train", unit="step", file=sys.stderr
            )

    def step(self, metrics: dict[str, Any]) -> None:
        """Write one step's figures and move the bar."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._bar is not None:
            self._bar.set_postfix_str(self.describe(metrics), refresh=False)
            self._bar.update()

    def describe(self, metrics: dict[str, Any]) -> str:
        """What the bar says about a step."""
        moved = metrics["inter_node_bytes"] + metrics["intra_node_bytes"]
        depth, waited = metrics["planned_ahead"], metrics["plan_wait_seconds"]
        ahead = "" if depth is None else f", {depth} planned ahead"
        return (
            f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s, "
            f"balance {metrics['compute_balance']:.2f}, {moved / 1e6:.1f} MB moved"
            f"{ahead}, {waited / metrics['seconds']:.1%} waiting for plans"
        )

    def draw(self, plan: Plan) -> None:
        """Write the picture of a plan: who owns and who computes which block."""
        with suppress(ImportError):  # a picture is not worth a failed job
            from dcp.report.plan_page import write_plan_page

            write_plan_page(plan, self.folder / PLAN_PAGE)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
