"""Files that hold documents: which there are, of which kind, and how each is opened and refused."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; no part of the text
TEXT, JSON, PARQUET = "text", "JSON", "Parquet"
_ENDINGS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".parquet": PARQUET, ".pq": PARQUET}
# What might pass for text, or has no text in it; other files are text if their bytes are.
_NOT_READ = {
    **dict.fromkeys((".csv", ".tsv"), "a table as text"),
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "Arrow"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), "a pickle"),
    **dict.fromkeys((".npy", ".npz"), "NumPy"),
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"), "an archive"),
    **dict.fromkeys((".avro", ".orc", ".h5", ".hdf5", ".xls", ".xlsx", ".safetensors"), "binary"),
    **dict.fromkeys((".pdf", ".ps", ".doc", ".docx", ".rtf"), "a laid-out page"),
}
_FIRST_BYTES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x93NUMPY": "NumPy",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x80": "a pickle",
}


def _open_zstd(path: str) -> Any:
    pyarrow = import_or_refuse("pyarrow", "pyarrow", f"{path}: .zst files")
    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


_PACKED: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


class PinnedFile:
    """A file, as it is when this is made: opening it later refuses another content.

    Attributes:
        size: bytes on disk.
        packed: the ending of its compression, or "".
    """

    def __init__(self, path: str) -> None:
        self.path = path
        ending = os.path.splitext(path)[1].lower()
        self.packed = ending if ending in _PACKED else ""
        with naming(path):
            self._stamp = _stamp(os.stat(path))
        self.size = self._stamp[0]

    def check(self) -> None:
        """``ValueError`` where it is gone, or another one than it was."""
        with naming(self.path):
            if _stamp(os.stat(self.path)) != self._stamp:
                raise ValueError(
                    f"{self.path} has changed since its documents were listed: leave the data "
                    f"alone during a run, and start again"
                )

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Its bytes, decompressed; ``ValueError``, with the file's name, where that fails."""
        self.check()
        opened = _PACKED.get(self.packed, partial(open, mode="rb"))
        with naming(self.path), opened(self.path) as file:
            yield file

    def text(self) -> bytes:
        """All of it as checked UTF-8, without byte-order mark."""
        with self.open() as file:
            return checked_text(file.read(), self.path)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Failures to read a file become a ``ValueError`` with its name."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        named = getattr(error, "filename", None) or path
        raise ValueError(f"{named} cannot be read: {reason}") from None


def checked_text(data: bytes, where: str) -> bytes:
    """The bytes of a text file; ``ValueError`` with the line where they are no UTF-8 text."""
    data = data.removeprefix(BYTE_ORDER_MARK)
    for first, kind in _FIRST_BYTES.items():
        if data.startswith(first):
            raise ValueError(f"{where} is {kind}, not UTF-8 text: convert it, or leave it out")
    try:
        data.decode()
        bad = data.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        line = data.count(b"\n", 0, bad) + 1
        raise ValueError(
            f"{where}:{line} is not UTF-8 text, it holds byte 0x{data[bad]:02x}: convert the file, "
            f"or leave it out"
        )
    return data


def parsed_json(text: bytes, where: str, kind: str) -> Any:
    """The value of a ``kind`` such as a JSON line; ``ValueError`` where it is damaged."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        if lines := text.count(b"\n", 0, error.start):
            where = f"{where}:{lines + 1}"
        byte = text[error.start]
        raise ValueError(f"{where} is not UTF-8 text, it holds byte 0x{byte:02x}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not a {kind}: {error}") from None


def find_files(source: str) -> list[str]:
    """Regular files by path: one file, a pattern such as ``data/**/*.txt``, or all of a folder.

    Sorted; hidden files and ``__pycache__`` are left out. ``ValueError`` for what is not there,
    cannot be looked into, or is neither file nor folder.
    """
    with naming(source):
        if os.path.isfile(source):
            return [source]
        if os.path.isdir(source):
            paths = sorted(walk(source))
        elif glob.has_magic(source):
            paths = sorted(p for p in glob.glob(source, recursive=True) if not os.path.isdir(p))
        elif os.path.lexists(source):
            paths = [source]
        else:
            raise ValueError(
                f"source {source!r} is neither a path or pattern here nor 'python' nor 'hf:NAME'"
            )
    for path in paths:
        if not os.path.isfile(path):
            what = "no regular file"
            if os.path.islink(path):
                what = f"a link to {os.readlink(path)!r}, where no file is"
            raise ValueError(f"{path} is {what}: remove it, or choose files by a pattern")
    return paths


def walk(folder: str, *, follow: bool = True) -> Iterator[str]:
    """Paths of what is under a folder but hidden files and folders, in no particular order.

    Follows links to folders, and refuses one that leads to a folder a second time.
    """

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    walker = os.walk(folder, followlinks=follow, onerror=refuse if follow else None)
    for where, folders, files in walker:
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        if follow and (real := os.path.realpath(where)) in seen:
            raise ValueError(f"{where} is a link to {real}, which is in the data already")
        elif follow:
            seen.add(real)
        yield from (os.path.join(where, name) for name in files if not name.startswith("."))


def kind_of_files(paths: Sequence[str], source: str) -> str:
    """``TEXT``, ``JSON`` or ``PARQUET``: what all these files are, by their endings.

    ``ValueError`` where they differ, so that none hides the others, or are of a kind not read.
    """
    endings = [_ending(path) for path in paths]
    kinds = {_kind(ending) for ending in endings}
    if len(kinds) > 1:
        counts = Counter(ending or "unnamed" for ending in endings).most_common()
        found = ", ".join(f"{count} {ending}" for ending, count in counts)
        common = next(ending for ending, _ in counts if ending != "unnamed")
        pattern = os.path.join(source, "**", f"*{common}*")
        raise ValueError(
            f"{source!r} holds files of several kinds ({found}): choose one by a pattern, such as "
            f"{pattern!r}"
        )
    for path, ending in zip(paths, endings, strict=True):
        if ending in _NOT_READ:
            raise ValueError(
                f"{path} is {_NOT_READ[ending]} ({ending}), which is not read: convert it to "
                f".jsonl, .parquet or .txt"
            )
        if _kind(ending) == PARQUET and PinnedFile(path).packed:
            raise ValueError(f"{path} is a compressed Parquet file: decompress it first")
    return kinds.pop() if kinds else TEXT


def _kind(ending: str) -> str:
    return _NOT_READ.get(ending, _ENDINGS.get(ending, TEXT))


def _ending(path: str) -> str:
    """``".jsonl"`` of ``A.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def import_or_refuse(module: str, package: str, purpose: str) -> Any:
    """A module; ``ValueError`` with the package to install where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"{purpose} need the {package} package: pip install {package}") from None


def first_line(error: Exception) -> str:
    """What an error says, to be put into another's one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)
