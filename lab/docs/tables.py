"""What all tables of docs/measured.md share."""

from __future__ import annotations

from typing import Any

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#718096", "#b7791f")


def made_by(run: dict[str, Any]) -> str:
    where = run["conditions"]
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    return (
        f"`{where['command']}`, {where['date']}: {where['num_cores']} cores of {where['processor']}"
        f", Python {where['python']}, {versions}."
    )


def met(holds: bool) -> str:
    return "met" if holds else "**not met**"
