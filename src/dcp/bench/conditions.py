"""What a measurement ran on: kept beside every result."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "numba", "mtkahypar", "torch", "triton")


def conditions() -> dict[str, Any]:
    """Machine, versions and command of this process."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "processor": _processor(),
        "num_cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "driver": _driver(),
    }


def _program() -> str:
    program = Path(sys.argv[0])
    is_module = program.name == "__main__.py"  # of a package, started by python -m
    return f"python -m {program.parent.name}" if is_module else program.name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _driver() -> str | None:
    """NVIDIA's kernel driver, where there is one."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
