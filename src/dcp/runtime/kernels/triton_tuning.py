"""Tiles of the Triton kernels timed on the device that they run on, at first use, and kept.

``kernel=TunedTritonKernel()`` in place of a kernel's name asks for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from dataclasses import asdict, astuple, dataclass
from itertools import product
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch

from dcp.checks import read_json, shown, whole_numbers
from dcp.runtime.kernels import Options
from dcp.runtime.kernels.triton import TritonKernel
from dcp.runtime.kernels.triton_options import DEFAULT, TritonOptions
from dcp.runtime.kernels.triton_shapes import Shape, Shapes, choose_shapes
from dcp.runtime.kernels.triton_timing import KERNELS, Timed, candidates, on_device

FORMAT = "dcp triton tiles, 1"


@dataclass(frozen=True)
class Case:
    """What tiles are found for; another case is timed anew. ``architecture``: 90 for 9.0;
    ``widest``: numbers of a key or value, whichever has more."""

    device: str
    architecture: int
    triton: str
    dtype: str
    widest: int
    forms: TritonOptions

    @classmethod
    def of(
        cls, device: torch.device, widest: int, dtype: torch.dtype, forms: TritonOptions
    ) -> Case:
        import triton

        major, minor = torch.cuda.get_device_capability(device)
        name, short = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
        return cls(name, 10 * major + minor, triton.__version__, short, widest, forms)

    @property
    def file_name(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return f"triton-tiles-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class TunedTritonKernel(TritonKernel):
    """The Triton kernels with the fastest of some tiles, on CUDA devices only.

    When a program is first prepared for a device, dtype and width, every candidate is compiled,
    compared with dense attention and timed; later processes read what was found. Tiles decide in
    which order sums are made: results under other tiles differ in their last bits.

    Args:
        forms: what the kernels do otherwise than by default.
        folder: where the files lie; by default ``dcp`` in the user's cache folder.
    """

    def __init__(self, forms: TritonOptions = DEFAULT, *, folder: str | Path | None = None) -> None:
        super().__init__(forms)
        self._folder = folder
        self._found: dict[tuple[torch.device, int, torch.dtype], Shapes] = {}

    def refusal(self, device: torch.device, dtype: torch.dtype, options: Options) -> str | None:
        if device.type != "cuda":
            return "tiles are timed on CUDA devices only; TritonKernel() takes them as they are"
        return super().refusal(device, dtype, options)

    def shapes(self, device: torch.device, widest: int, dtype: torch.dtype) -> Shapes:
        key = device, widest, dtype
        if key not in self._found:
            case = Case.of(device, widest, dtype, self.forms)
            usual = choose_shapes(device, widest, dtype)
            timed = on_device(device, widest, dtype, self.forms)
            self._found[key] = tuned_shapes(case, usual, timed, self._folder)
        return self._found[key]


# --------------------------------------------------------------------------- the choice


def tuned_shapes(
    case: Case, usual: Shapes, timed: Timed, folder: str | Path | None = None
) -> Shapes:
    """The shapes that the folder's file has for the case; where there are none, the fastest by
    ``timed``, which are then written there. Where all candidates fail, the usual ones."""
    path = Path(folder or cache_folder()) / case.file_name
    itemsize = getattr(torch, case.dtype).itemsize
    known = {name: candidates(name, usual, case.widest, itemsize) for name in KERNELS}
    if (held := _read(path, case, known)) is not None:
        return held
    seconds = {name: _seconds(name, shapes, timed) for name, shapes in known.items()}
    queries = _fastest_pair(*(seconds[name] for name in KERNELS[:2]))
    keys = _fastest_pair(*(seconds[name] for name in KERNELS[2:]))
    if queries is None or keys is None:
        failed = KERNELS[:2] if queries is None else KERNELS[2:]
        warnings.warn(
            f"no tiles work for {' and '.join(failed)} of {case}: the built-in ones are used",
            stacklevel=2,
        )
        return usual
    # another process may have been faster: those who share a folder should agree
    found = _read(path, case, known, quiet=True)
    return found or _write(path, case, Shapes(*queries, *keys))


def _seconds(name: str, shapes: list[Shape], timed: Timed) -> dict[Shape, float]:
    """Of the shapes that work."""
    found = {}
    for shape in shapes:
        try:
            found[shape] = timed(name, shape)
        except Exception as error:  # the compiler's, the device's, or the comparison's
            logging.getLogger("dcp").info("tile %s of %s is left out: %s", shape, name, error)
    return found


def _fastest_pair(one: dict[Shape, float], two: dict[Shape, float]) -> tuple[Shape, Shape] | None:
    """Of two kernels that share a table, the tiles with the least time together."""
    pairs = [(a, b) for a, b in product(one, two) if a.shares_table(b)]
    return min(pairs, key=lambda pair: one[pair[0]] + two[pair[1]], default=None)


# --------------------------------------------------------------------------- the file


def cache_folder() -> Path:
    """``dcp`` in the user's cache folder, as the XDG base directories say where that is."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dcp")


def _read(
    path: Path, case: Case, known: dict[str, list[Shape]], *, quiet: bool = False
) -> Shapes | None:
    """The file's shapes; None where there is no file, and, with a warning, where it is not one of
    ours for this case."""
    if not path.exists():
        return None
    try:
        return _checked(read_json(path), case, known)
    except (ValueError, OSError) as error:
        if not quiet:
            warnings.warn(f"{path} is not used, and made anew: {error}", stacklevel=3)
        return None


def _checked(held: Any, case: Case, known: dict[str, list[Shape]]) -> Shapes:
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise ValueError(f"it is not in the format {FORMAT!r}")
    if held.get("case") != asdict(case):
        raise ValueError(f"it is for {shown(held.get('case'))}, not for {asdict(case)}")
    tiles = held.get("tiles")
    if not isinstance(tiles, dict) or set(tiles) != set(KERNELS):
        raise ValueError(f"it needs a tile for each of {', '.join(KERNELS)}, got {shown(tiles)}")
    for name, numbers in tiles.items():
        whole_numbers(f"tile of {name}", numbers, most=1 << 10)
        if tuple(numbers) not in map(astuple, known[name]):
            raise ValueError(f"{name} has no tile {shown(numbers)}")
    return Shapes(*(Shape(*tiles[name]) for name in KERNELS))


def _write(path: Path, case: Case, found: Shapes) -> Shapes:
    """Keep what was found, whole or not at all; a folder that cannot be written to is no error."""
    tiles = {name: list(astuple(getattr(found, name))) for name in KERNELS}
    text = json.dumps({"format": FORMAT, "case": asdict(case), "tiles": tiles}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"tiles are not kept for later processes: {error}", stacklevel=3)
    return found
