"""Figure 20: real training curves, static and planned, from the same weights and batches.

Local processes train a small Llama on the documents of ``--source``; the mask's windows and blocks
are as much shorter as its sequences are. Only the strategy differs between the two systems.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dcp.jobs import PLANNED, Options, launch
from dcp.train.record import METRICS, OPTIONS
from lab.paper.rows import Row, write_rows
from lab.paper.workbench import MASKS, Workbench

STEPS = 120
PROCESSES = 2
SYSTEMS = {"static": "zigzag", "dcp": "auto"}
SHRUNK = {  # of 131,072 tokens to 2,048: the published windows and blocks over 64
    "streaming": "streaming:sink=4,window=64",
    "causal_blockwise": "causal_blockwise:block=8",
}


def rows(bench: Workbench, *, source: str = "python", masks: Sequence[str] = MASKS) -> list[Row]:
    """Loss and seconds of every step, mask and system; runs that are complete are not repeated."""
    steps = bench.count(STEPS)
    found: list[Row] = []
    for mask in masks:
        for system, strategy in SYSTEMS.items():
            output = bench.out / "runs" / f"{mask}-{system}"
            options = _options(output, mask, strategy, steps, source)
            metrics = _metrics(options) or _train(options)
            found += [
                {
                    "mask": mask,
                    "system": system,
                    "step": each["step"] - 1,  # the figures count from 0
                    "loss": each["loss"],
                    "seconds": each["seconds"],
                    "tokens": each["num_tokens"],
                    "strategy": each["strategy"],
                }
                for each in metrics
            ]
    write_rows(bench.data / "loss.csv", found)
    return found


def _options(output: Path, mask: str, strategy: str, steps: int, source: str) -> Options:
    return {
        "job": PLANNED,
        "data": source,
        "max_documents": 2000,
        "tokens_per_batch": 4096,
        "max_seqlen": 2048,
        "mask": SHRUNK.get(mask, mask),
        "config_overrides": "hidden_size=64,intermediate_size=192,num_hidden_layers=2",
        "max_steps": steps,
        "seed": 0,
        "save_strategy": "no",
        "strategy": strategy,
        "output_dir": str(output),
    }


def _train(options: Options) -> list[Row]:
    launch(options, num_processes=PROCESSES)
    metrics = _metrics(options)
    assert metrics is not None, "a finished job leaves all its steps"
    return metrics


def _metrics(options: Options) -> list[Row] | None:
    """The steps of a run with these very options, or None where it is not complete."""
    folder = Path(options["output_dir"])
    try:
        known = json.loads((folder / OPTIONS).read_text())
        lines = (folder / METRICS).read_text().splitlines()
    except OSError:
        return None
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    return steps if known == options and len(steps) == options["max_steps"] else None
