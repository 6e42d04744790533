"""The one checked binary format for what crosses a process, a network or a disk.

A message is a header (magic, version, kind, lengths, CRC-32), a JSON object and named numpy
arrays. Nothing in it can run code; a damaged, truncated or foreign message is refused, and so is
one whose arrays would take more than :data:`MOST_BYTES`, before anything is unpacked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from math import isfinite, prod
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

#: Bytes of all arrays of a message. A plan of 1,024 ranks and a million compute blocks has 0.1 GB.
MOST_BYTES = 1 << 31
_MAGIC = b"DCP\x02"
_HEADER = struct.Struct("<4s16sIQI")  # magic, kind, JSON bytes, array bytes, CRC-32 of both
_DTYPES = {"|b1", "|i1", "|u1", "<i2", "<i4", "<i8", "<f4", "<f8"}
_WRONG = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
Record = TypeVar("Record")


class WireError(ValueError):
    """The bytes are not a message of ours, not of the expected kind, or damaged."""


def pack(kind: str, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """One message: JSON-able ``meta`` and named arrays (integers narrowed to what they need).

    Raises ``ValueError`` for arrays beyond :data:`MOST_BYTES`, and for NaN or infinity in ``meta``.
    """
    layout, chunks = [], []
    for name, array in arrays.items():
        array = _narrow(np.ascontiguousarray(array))
        layout.append([name, array.dtype.str, list(array.shape)])
        chunks.append(array.tobytes())
    if (size := sum(map(len, chunks))) > MOST_BYTES:
        raise ValueError(f"a dcp {kind} of {size} bytes is beyond {MOST_BYTES}: make several")
    header = {"meta": meta, "arrays": layout}
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"a dcp {kind} cannot hold nan or infinity: {error}") from None
    body = zlib.compress(b"".join(chunks), level=1)
    crc = zlib.crc32(body, zlib.crc32(text))
    return _HEADER.pack(_MAGIC, kind.encode(), len(text), len(body), crc) + text + body


def unpack(kind: str, message: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The ``meta`` and arrays of a message of this kind; :class:`WireError` for anything else."""
    if len(message) < _HEADER.size:
        raise WireError(f"not a dcp {kind}: {len(message)} bytes is shorter than a header")
    magic, found, text_bytes, body_bytes, crc = _HEADER.unpack_from(message)
    found_kind = found.rstrip(b"\0").decode(errors="replace")
    if magic[:3] == _MAGIC[:3] and magic != _MAGIC:
        raise WireError(f"a dcp {kind} of format {magic[3]}, this dcp reads format {_MAGIC[3]}")
    if magic != _MAGIC:
        raise WireError(f"not a dcp {kind}: it starts with {magic!r}")
    if found_kind != kind:
        raise WireError(f"expected a dcp {kind}, got a {found_kind}")
    text = message[_HEADER.size : _HEADER.size + text_bytes]
    body = message[_HEADER.size + text_bytes :]
    if len(body) != body_bytes or zlib.crc32(body, zlib.crc32(text)) != crc:
        raise WireError(f"damaged dcp {kind}: length or checksum does not match")
    with reading(kind):
        return _parse(kind, text, body)


def _parse(kind: str, text: bytes, body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    header = json.loads(text, parse_constant=_finite, parse_float=_finite)
    exactly("the header", header, ("meta", "arrays"))
    raw, at = _inflate(kind, body, _num_bytes(kind, header["arrays"])), 0
    arrays: dict[str, np.ndarray] = {}
    for name, dtype, shape in header["arrays"]:
        array = np.frombuffer(raw, dtype=dtype, count=prod(shape), offset=at).reshape(shape)
        at += array.nbytes
        arrays[name] = array.astype(np.int64) if array.dtype.kind == "i" else array
    if not isinstance(header["meta"], dict) or len(arrays) != len(header["arrays"]):
        raise WireError(f"damaged dcp {kind}: it holds no object, or two arrays of one name")
    return header["meta"], arrays


def _finite(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError(f"the number {text} is not finite")
    return number


def _num_bytes(kind: str, layout: list[tuple[str, str, list[int]]]) -> int:
    """Bytes of the arrays that a header announces."""
    size = 0
    for name, dtype, shape in layout:
        if not isinstance(name, str) or dtype not in _DTYPES:
            raise WireError(f"dcp {kind}: array {name!r} has dtype {dtype!r}")
        if not all(type(length) is int and length >= 0 for length in shape):
            raise WireError(f"dcp {kind}: array {name!r} has shape {shape!r}")
        size += prod(shape) * np.dtype(dtype).itemsize
    if size > MOST_BYTES:
        raise WireError(f"dcp {kind} of {size} bytes: more than {MOST_BYTES} are not read")
    return size


def _inflate(kind: str, body: bytes, size: int) -> bytes:
    """The ``size`` bytes that ``body`` holds; no more is unpacked to see that they are more."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(body, size + 1)
    except zlib.error as error:
        raise WireError(f"damaged dcp {kind}: {error}") from None
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise WireError(f"damaged dcp {kind}: its arrays are not the {size} bytes announced")
    return raw


# --------------------------------------------------------------------------- what messages hold


@contextmanager
def reading(kind: str) -> Iterator[None]:
    """What goes wrong in here is the message's fault: a :class:`WireError`."""
    try:
        yield
    except WireError:
        raise
    except _WRONG as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise WireError(f"damaged dcp {kind}: {said}") from None


def exactly(what: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """``WireError`` unless ``found`` names all that is wanted, and nothing else."""
    found, wanted = set(found), set(wanted)
    if lacking := sorted(wanted - found):
        raise WireError(f"{what} lacks {', '.join(lacking)}")
    if unknown := sorted(map(str, found - wanted)):
        raise WireError(f"{what} has unknown {', '.join(unknown)[:300]}")


def record(kind: type[Record], values: Any) -> Record:
    """A dataclass from the JSON object of its fields, each of its own type; lists are tuples.

    Fields with the metadata ``optional`` may be absent. A dataclass in a field comes as the object
    of its fields, which the outer one turns into it.
    """
    hints = get_type_hints(kind)
    name = kind.__name__
    if not isinstance(values, dict):
        raise WireError(f"{name} is {values!r:.100}, not an object")
    every = fields(kind)  # type: ignore[arg-type]
    known = [x.name for x in every if x.name in values or not x.metadata.get("optional")]
    exactly(name, values, known)
    for key, value in values.items():
        if not _is_of(value, hints[key]):
            raise WireError(f"{name}.{key} is {value!r:.100}")
    return kind(**values)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether what JSON gave is of a field's type."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_is_of(value, each) for each in of)
    if origin is tuple:
        each_of = of[:1] * len(value) if isinstance(value, list) and of[-1] is ... else of
        return (
            isinstance(value, list)
            and len(value) == len(each_of)
            and all(map(_is_of, value, each_of))
        )
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        names = set(hints)
        return (
            isinstance(value, dict)
            and set(value) == names
            and all(_is_of(value[name], hints[name]) for name in names)
        )
    if origin is dict:
        return isinstance(value, dict) and all(_is_of(each, of[1]) for each in value.values())
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def _narrow(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "iu" or array.dtype == np.uint8:
        return array
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array.astype(np.int64)
