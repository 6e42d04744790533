"""Configurations as dataclasses: a field is a key of a file and an option of the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Self, get_type_hints

from dcp.checks import read_json

MOST_YAML, MOST_YAML_BRACKETS = 1 << 16, 100
_YAML_BUGS = (AttributeError, LookupError, TypeError)  # what pyyaml itself stumbles over


def key(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    one_of: tuple[str, ...] = (),
    fixed: bool = False,
) -> Any:
    """A field of a configuration: its default, its help, and the values that it may have.

    A ``fixed`` one stays what it was when a job goes on from a checkpoint.
    """
    may = {"least": least, "above": above, "most": most, "one_of": one_of, "fixed": fixed}
    return field(default=default, metadata={"help": text, **may})


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Some keys, checked; parts of a job's configuration are composed by inheriting them all."""

    job: ClassVar[str] = ""  # what ``--job`` calls it; a part is no job

    def __post_init__(self) -> None:
        for each in fields(self):
            self._check_range(each)
        self.check()

    def check(self) -> None:
        """Refuse what does not go together; every part calls the next one's."""

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """``ValueError`` that says what a key must be, unless that ``holds``."""
        if not holds:
            raise ValueError(f"config key {name} must be {wanted}, got {getattr(self, name)!r}")

    def require_default(self, name: str, where: str, how: str) -> None:
        """``ValueError`` for a key that was set and does nothing ``where``."""
        value = getattr(self, name)
        if value != self.__dataclass_fields__[name].default:
            raise ValueError(
                f"config key {name}={value!r} has no effect {where}: leave it out, or {how}"
            )

    def _check_range(self, each: Field[Any]) -> None:
        value, may = getattr(self, each.name), each.metadata
        least, above, most, one_of = may["least"], may["above"], may["most"], may["one_of"]
        if isinstance(value, float):
            self.require(each.name, isfinite(value), "finite")
        if most is not None:
            self.require(each.name, value <= most, f"{most} or less")
        if least is not None:
            self.require(each.name, value >= least, f"{least} or more")
        if above is not None:
            self.require(each.name, value > above, f"above {above}")
        if one_of:
            self.require(each.name, value in one_of, f"one of {', '.join(map(repr, one_of))}")

    def require_same(self, saved: Any, where: str) -> None:
        """``ValueError`` for the first fixed key that has another value in ``saved``."""
        names = ["job", *(each.name for each in fields(self) if each.metadata["fixed"])]
        here = self.to_json()
        for name in names:
            there = saved.get(name) if isinstance(saved, dict) else None
            if there != here[name] or type(there) is not type(here[name]):
                raise ValueError(
                    f"{where} is of another job: {name} was {there!r} and is {here[name]!r}"
                )

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """A config of checked keys and types; ``where`` names the origin in errors."""
        kinds = {name: kind for name, kind, *_ in cls.options()}
        given = dict(values)
        job = given.pop("job", cls.job)
        if job != cls.job:
            raise ValueError(f"{where}: a config of job {job!r}, wanted is one of {cls.job!r}")
        for name in [name for name in given if name not in kinds]:
            near = difflib.get_close_matches(str(name), kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown config key {name!r}{hint}")
        what = f"{where}: config key "
        return cls(
            **{name: _as_kind(value, kinds[name], what + name) for name, value in given.items()}
        )

    @classmethod
    def load(cls, path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a YAML or JSON file (None: the defaults); ``overrides`` win over it."""
        values = {} if path is None else read_values(Path(path))
        return cls.from_mapping({**values, **(overrides or {})}, where=str(path or "options"))

    def to_json(self) -> dict[str, Any]:
        """All keys and the job's name, as :meth:`from_mapping` takes them."""
        return {"job": self.job, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write all keys as JSON, which :meth:`load` reads."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def options(cls) -> list[tuple[str, type, Any, str]]:
        """(key, type, default, help) of every key, in order; a default of None is left open."""
        kinds = get_type_hints(cls)
        return [
            (each.name, kinds[each.name], each.default, each.metadata["help"])
            for each in fields(cls)
        ]


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
            raise ValueError("aliases are not read")  # a few of them may stand for gigabytes
        return yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError, *_YAML_BUGS) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None


def _as_kind(value: Any, kind: type, what: str) -> Any:
    """The value in the field's type: an int is a float, YAML's ``3e-3`` text is one too."""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise ValueError(
        f"{what} must be of type {getattr(kind, '__name__', kind)}, got {value!r:.200}"
    )
