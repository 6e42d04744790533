"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

``manifest.json``, written last, holds the size and the SHA-256 of every file; a folder without it,
or with a file that is another, is refused by the file's name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcp.checks import read_json
from dcp.errors import DCPError

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST, FORMAT = "manifest.json", 1
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write weights (with the model's ``config.json``), optimiser state and ``state``.

    Raises ``DCPError`` where it cannot be written; then nothing is left of it, and an older
    checkpoint in its place stays.
    """
    draft, old = (folder.with_name(folder.name + end) for end in (".partial", ".old"))
    try:
        for rest in (draft, old):
            shutil.rmtree(rest, ignore_errors=True)
        draft.mkdir(parents=True)
        _write(draft, model, optimizer, state)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
    except BaseException as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise DCPError(f"checkpoint {folder} cannot be written: {error}") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill the model and the optimiser; returns what was saved as ``state``.

    Raises ``ValueError``, and changes nothing, for a folder that is no checkpoint, for a file of it
    that is damaged or another one, and for one of another model; the message names the file.
    """
    _check_files(folder)
    state = read_json(folder / STATE)
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError(f"{folder / STATE}: step must be an integer, 0 or more, got {step!r}")
    try:
        weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a checkpoint: {error}") from None
    parameters = dict(model.named_parameters())
    _check_tensors(folder / MODEL, weights, parameters)
    fresh = set(state.get("without_moments") or ())
    wanted: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name not in fresh:
            like = (torch.zeros((), dtype=torch.float32), parameter, parameter)
            wanted |= {f"{name}|{key}": of for key, of in zip(_MOMENTS, like, strict=True)}
    _check_tensors(folder / OPTIMIZER, moments, wanted)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
        optimizer.state[parameter] = {
            key: moments[f"{name}|{key}"].to(parameter.device if key != "step" else "cpu")
            for key in (_MOMENTS if name not in fresh else ())
        }
    return state


def find_checkpoint(resume: str, output: Path) -> Path | None:
    """The folder that ``resume`` names.

    ``"latest"`` is the newest of the output folder's; so is ``"auto"``, or None without any.
    """
    if resume not in ("latest", "auto"):
        return Path(resume)
    found = sorted((output / "checkpoints").glob("step-" + "[0-9]" * 8))
    if not found and resume == "latest":
        raise ValueError(f"resume='latest': no checkpoint in {output / 'checkpoints'}")
    return found[-1] if found else None


def _write(
    draft: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    # names of the parameters themselves: a weight that is tied to another is written once
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, draft / MODEL, metadata={"format": "pt"})
    save_file(_moments(model, optimizer), draft / OPTIMIZER)
    config: Any = model.config
    config.save_pretrained(draft)
    fresh = [name for name, p in model.named_parameters() if not optimizer.state.get(p)]
    text = json.dumps(state | {"without_moments": fresh}, indent=2)
    (draft / STATE).write_text(text + "\n", encoding="utf-8")
    files = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
    manifest = json.dumps({"format": FORMAT, "files": files}, indent=2)
    (draft / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _check_files(folder: Path) -> None:
    """Every file of the manifest is there and is the one that was written."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST}")
    manifest = read_json(path)
    files: Any = manifest.get("files") if isinstance(manifest, dict) else None
    whole = isinstance(files, dict) and {MODEL, OPTIMIZER, STATE} <= set(files)
    if not whole or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a checkpoint of format {FORMAT}")
    for name, wanted in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: the checkpoint is not whole")
        if _fingerprint(folder / name) != wanted:
            raise ValueError(f"{folder / name} is damaged: it is not the file that was saved")


def _check_tensors(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The tensors that are wanted, no others, all finite."""
    for name in [*wanted, *found]:
        there, here = (_kind_of(of.get(name)) for of in (found, wanted))
        if there != here:
            raise ValueError(f"{path} is of another model: {name} is {there} there, {here} here")
    for name, tensor in found.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} is not finite, training had diverged")


def _kind_of(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
