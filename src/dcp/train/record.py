"""What a job shows and leaves behind: its options, metrics by step, curves, and a progress bar."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from dcp.report.curves import write_curves

METRICS, CURVES, OPTIONS = "metrics.jsonl", "curves.html", "config.json"


def record_job(trainer: Any, options: dict[str, Any]) -> None:
    """Record a job in its output folder, from the first rank, and show a bar of its steps.

    Without the bar (``disable_tqdm``) nothing is printed in its place.
    """
    trainer.remove_callback(PrinterCallback)
    bar = trainer.pop_callback(ProgressCallback)
    if bar is not None:
        trainer.add_callback(StepBar())
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OPTIONS).write_text(json.dumps(options, indent=2) + "\n")
    trainer.add_callback(Metrics(folder, trainer))


def say_where(trainer: Any, **pages: str) -> None:
    """The last words of a job: where things are."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    places = {"model": "model", "metrics": METRICS, "curves": CURVES, **pages}
    for what, name in places.items():
        if (folder / name).exists():
            print(f"{what:8} {folder / name}", file=sys.stderr)


class Metrics(TrainerCallback):
    """``metrics.jsonl``, a line of the log each, and its curves at the end.

    A job that goes on keeps the lines up to its checkpoint.
    """

    def __init__(self, folder: Path, trainer: Any) -> None:
        self._path, self._trainer = folder / METRICS, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        draft = self._path.with_suffix(".partial")
        kept = read_metrics(self._path, last=state.global_step)
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        draft.replace(self._path)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if "loss" in logs or is_evaluation:
            more = {} if is_evaluation else self._trainer.details()
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs, **more}) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lines = read_metrics(self._path, last=state.global_step)
        write_curves(lines, self._path.with_name(CURVES))


def read_metrics(path: Path, *, last: int) -> list[dict[str, Any]]:
    """Lines up to a step. One that cannot be read, as the last of a job that was killed may be, is
    forgotten: its step comes again, or the line was no metrics."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() and last else ""
    for line in text.splitlines():
        try:
            found = json.loads(line)
            if found["step"] <= last:
                lines.append(found)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return lines


class StepBar(ProgressCallback):
    """Trainer's progress bar, with a few of the figures at its end and no line for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(describe(logs))


def describe(logs: dict[str, Any]) -> str:
    """A step in some words."""
    words = [f"loss {logs['loss']:.3f}"]
    if "tokens_per_second" in logs:
        words.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    if "compute_balance" in logs:
        words.append(f"balance {logs['compute_balance']:.2f}")
        words.append(f"{logs['attention_bytes'] / 1e6:.1f} MB moved")
        words.append(f"{logs['plan_wait_seconds'] / logs['seconds']:.1%} waiting for plans")
    if "predicted_over_measured" in logs:
        words.append(f"attention predicted at {logs['predicted_over_measured']:.0%} of its time")
    if "plan_time_budget" in logs:
        words.append(f"{logs['plan_time_budget']:g} s for a plan")
    if "num_groups" in logs:
        words.append(f"{logs['num_groups']} groups")
    if "measured_imbalance" in logs:
        words.append(
            f"imbalance {logs['measured_imbalance']:.0%} "
            f"({logs['predicted_imbalance']:.0%} predicted)"
        )
    return ", ".join(words)
