"""Configuration files: keys and values in YAML or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcp.checks import read_json

MOST_YAML, MOST_YAML_BRACKETS = 1 << 16, 100
_YAML_BUGS = (AttributeError, LookupError, TypeError)  # what pyyaml itself stumbles over


def read_values(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML or JSON file, as yet unchecked."""
    is_json = path.suffix == ".json"
    values = read_json(path) if is_json else _read_yaml(path)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not keys and values")
    return values


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{path}: YAML needs the pyyaml package; or write JSON") from None
    try:
        text = path.read_text(encoding="utf-8")
        # pyyaml takes time that is quadratic in both
        if len(text) > MOST_YAML or text.count("[") + text.count("{") > MOST_YAML_BRACKETS:
            raise ValueError(f"{len(text)} characters or their brackets are no configuration")
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError(
                "aliases (&name, *name) are not read: make them values"
            )  # a few of them may stand for gigabytes
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError, *_YAML_BUGS) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
