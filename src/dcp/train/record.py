"""What a job shows and leaves behind: options, metrics by step, a page of them, a progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from dcp.report.training_page import write_training_page

METRICS, PAGE, OPTIONS = "metrics.jsonl", "training.html", "config.json"
RELOAD_SECONDS = 5.0  # between two writings of the page, and more where one takes long
PAGE_SHARE = 0.01  # of the time that may go into writing it


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
    places = {"model": "model", "metrics": METRICS, "training": PAGE, **pages}
    for what, name in places.items():
        if (folder / name).exists():
            print(f"{what:8} {folder / name}", file=sys.stderr)


class Metrics(TrainerCallback):
    """``metrics.jsonl``, a line of the log each, and a page of them, written anew while training
    runs.

    A job that goes on keeps the lines up to its checkpoint.
    """

    def __init__(self, folder: Path, trainer: Any) -> None:
        self._path, self._trainer = folder / METRICS, trainer
        self._lines: list[dict[str, Any]] = []
        self._next_page, self._is_over = 0.0, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        draft = self._path.with_suffix(".partial")
        self._lines = read_metrics(self._path, last=state.global_step)
        draft.write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        draft.replace(self._path)
        self._is_over = False
        self._write_page(state)
        self._next_page = 0.0  # the first step is worth a page

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        is_evaluation = any(name.startswith("eval_") for name in logs)
        if "loss" in logs or is_evaluation:
            more = {} if is_evaluation else self._trainer.details()
            line = {"step": state.global_step, **logs, **more}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._lines.append(line)
            if self._is_over or time.perf_counter() >= self._next_page:
                self._write_page(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_over = True
        self._write_page(state)

    def _write_page(self, state: Any) -> None:
        began = time.perf_counter()
        write_training_page(
            self._lines,
            self._path.with_name(PAGE),
            title=self._path.parent.name,
            max_steps=state.max_steps,
            reload_seconds=None if self._is_over else RELOAD_SECONDS,
            ranks=getattr(self._trainer, "rank_figures", None),
        )
        took = time.perf_counter() - began
        self._next_page = began + max(RELOAD_SECONDS, took / PAGE_SHARE)


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
