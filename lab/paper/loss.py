"""Figure 20: real training curves, static and planned, from the same weights and batches.

Local processes train a small Llama on the documents of ``--source``; the mask's windows and blocks
are as much shorter as its sequences are. Only the strategy differs between the two systems.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dcp.jobs import launch
from dcp.train.config import TrainConfig
from dcp.train.journal import METRICS
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
            config = _config(bench.out / "runs" / f"{mask}-{system}", mask, strategy, steps, source)
            metrics = _metrics(config) or _train(config)
            found += [
                {
                    "mask": mask,
                    "system": system,
                    "step": each["step"],
                    "loss": each["loss"],
                    "seconds": each["seconds"],
                    "tokens": each["num_tokens"],
                    "strategy": each["strategy"],
                }
                for each in metrics
            ]
    write_rows(bench.data / "loss.csv", found)
    return found


def _config(output: Path, mask: str, strategy: str, steps: int, source: str) -> TrainConfig:
    return TrainConfig(
        source=source,
        max_documents=2000,
        tokens_per_batch=4096,
        max_seqlen=2048,
        mask=SHRUNK.get(mask, mask),
        hidden_size=64,
        num_layers=2,
        steps=steps,
        strategy=strategy,
        output=str(output),
    )


def _train(config: TrainConfig) -> list[Row]:
    launch(config, num_processes=PROCESSES)
    metrics = _metrics(config)
    assert metrics is not None, "a finished job leaves all its steps"
    return metrics


def _metrics(config: TrainConfig) -> list[Row] | None:
    """The steps of a run with this very configuration, or None where it is not complete."""
    folder = Path(config.output)
    try:
        known = json.loads((folder / "config.json").read_text())
        lines = (folder / METRICS).read_text().splitlines()
    except OSError:
        return None
    if known != config.to_json() or len(lines) != config.steps:
        return None
    return [json.loads(line) for line in lines]
