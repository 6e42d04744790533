"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write weights (with the model's ``config.json``), optimiser state and ``state``."""
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    # names of the parameters themselves: a weight that is tied to another is written once
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, draft / MODEL, metadata={"format": "pt"})
    save_file(_moments(model, optimizer), draft / OPTIMIZER)
    config: Any = model.config
    config.save_pretrained(draft)
    (draft / STATE).write_text(json.dumps(state, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill the model and the optimiser; returns what was saved as ``state``.

    Raises ``ValueError`` for a folder that is no checkpoint or one of another model.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from None
    for name, parameter in model.named_parameters():
        found = weights.get(name)
        if found is None or found.shape != parameter.shape:
            there = "missing" if found is None else tuple(found.shape)
            here = tuple(parameter.shape)
            raise ValueError(f"{folder} is of another model: {name} is {there} there, {here} here")
        parameter.data.copy_(found)
        optimizer.state[parameter] = {
            key: moments[f"{name}|{key}"].to(parameter.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{name}|{key}" in moments
        }
    return state


def find_checkpoint(resume: str, output: Path) -> Path:
    """The folder that ``resume`` names; ``"latest"`` is the newest of the output folder's."""
    if resume != "latest":
        return Path(resume)
    found = sorted((output / "checkpoints").glob("step-" + "[0-9]" * 8))
    if not found:
        raise ValueError(f"resume='latest': no checkpoint in {output / 'checkpoints'}")
    return found[-1]


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
