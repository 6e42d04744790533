"""Checks of what users give: each returns the value in the type that is kept, or names it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

MOST_INTEGER = 2**63 - 1  # what an int64 array holds
_SHOWN = 80  # characters of a wrong value in a message


class TooMany(ValueError):
    """A size beyond what is stated as a limit; the message has the number and the remedy."""


def whole(name: str, value: Any, *, least: int = 0, most: int = MOST_INTEGER) -> int:
    """A whole number from ``least`` to ``most``; numpy's count, booleans, strings and floats do
    not."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {shown(value)}")
    number = int(value)
    if number < least:
        raise ValueError(f"{name} must be {least} or more, got {number}")
    if number > most:
        raise ValueError(f"{name} must be {most} or less, got {shown(number)}")
    return number


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """A finite number of ``least`` or more."""
    found = _finite(name, value)
    if found < least:
        raise ValueError(f"{name} must be {least:g} or more, got {value!r}")
    return found


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    found = _finite(name, value)
    if not found > 0:
        raise ValueError(f"{name} must be more than 0, got {value!r}")
    return found


def whole_numbers(
    name: str, values: Any, *, least: int = 0, most: int = MOST_INTEGER
) -> np.ndarray:
    """A list, an iterator or a one-dimensional array of whole numbers: int64 ``[n]``."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of whole numbers, got {shown(values)}")
    given = values.tolist() if hasattr(values, "tolist") else list(values)
    if not isinstance(given, list):  # of an array without dimensions
        raise ValueError(f"{name} must be a list of whole numbers, got {shown(values)}")
    for index, value in enumerate(given):
        if type(value) is not int or not least <= value <= most:
            given[index] = whole(f"{name}[{index}]", value, least=least, most=most)
    return np.array(given, dtype=np.int64)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """One of the ``known`` words; the error says which may have been meant."""
    words = list(known)
    if not isinstance(value, str) or value not in words:
        listed = ", ".join(words)
        raise ValueError(f"{name} {shown(value)} is not one of {listed}{meant(value, words)}")
    return value


def meant(word: Any, known: Iterable[str]) -> str:
    """``"; did you mean ring?"``, or nothing where no word comes near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; ``ValueError`` that names the file where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def not_too_many(what: str, count: float, most: int, remedy: str) -> None:
    """Refuse a size before anything of that size is made."""
    if count > most:
        raise TooMany(f"{count:,.0f} {what} are too many (at most {most:,}): {remedy}")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a huge number"
    return " ".join(text.split())[:_SHOWN]


def _finite(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    return found
