"""Names of masks as text, with their parameters."""

from __future__ import annotations

from typing import Any

from dcp.checks import shown


def parse_mask(text: str) -> tuple[str, dict[str, Any]]:
    """``"streaming:sink=64,window=4096"`` -> ``("streaming", {"sink": 64, "window": 4096})``."""
    if not isinstance(text, str):
        raise ValueError(f"a mask's name must be a string, got {shown(text)}")
    name, _, rest = text.partition(":")
    parameters: dict[str, int | float] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key in parameters:
            raise ValueError(f"mask {text!r}: {key} is given twice")
        try:
            parameters[key] = int(value) if value.lstrip("+-").isdecimal() else float(value)
        except ValueError:
            raise ValueError(f"mask parameter {item!r} is not KEY=NUMBER") from None
    return name, parameters
