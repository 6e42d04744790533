"""Result files that several runs of a benchmark fill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def merge(path: Path, name: str, result: dict[str, Any]) -> None:
    """Write ``result`` under ``name``; the file's other results stay, an older one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = json.loads(path.read_text()) if path.exists() else {}
    held[name] = result
    path.write_text(json.dumps(held, indent=1) + "\n")
