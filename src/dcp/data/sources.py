"""Where documents come from: each source lists its documents cheaply and reads them one by one."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Documents:
    """Texts by index. Subclasses fill ``num_bytes`` and implement :meth:`read`.

    Attributes:
        num_bytes: UTF-8 bytes of each document, int64 ``[n]``, known without reading the texts.
    """

    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.num_bytes)

    def read(self, index: int) -> bytes:
        """The text of one document."""
        raise NotImplementedError


class TextFiles(Documents):
    """One document per file, in the order of the given paths."""

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.paths = [str(path) for path in paths]
        self.num_bytes = np.array([os.stat(p).st_size for p in self.paths], dtype=np.int64)

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


class JsonLines(Documents):
    """One document per line of JSONL files: the string under ``text_field``."""

    def __init__(self, paths: Iterable[Path], *, text_field: str = "text") -> None:
        self.paths, self.text_field = list(paths), text_field
        self._file, self._offset, num_bytes = [], [], []
        for number, path in enumerate(self.paths):
            for line_number, offset, line in _lines(path):
                text = self._text(line, f"{path}:{line_number}")
                self._file.append(number)
                self._offset.append(offset)
                num_bytes.append(len(text))
        self.num_bytes = np.array(num_bytes, dtype=np.int64)

    def read(self, index: int) -> bytes:
        path = self.paths[self._file[index]]
        with open(path, "rb") as file:
            file.seek(self._offset[index])
            return self._text(file.readline(), str(path))

    def _text(self, line: bytes, where: str) -> bytes:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not a JSON line: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(self.text_field), str):
            raise ValueError(f"{where} has no text under {self.text_field!r}; set text_field")
        return record[self.text_field].encode()


class ParquetRows(Documents):
    """One document per row of Parquet files: the string column ``text_field``.

    Reads one row group at a time and keeps the last one.
    """

    def __init__(self, paths: Iterable[Path], *, text_field: str = "text") -> None:
        parquet = _import("pyarrow.parquet", "pyarrow", "Parquet files")
        self.text_field, self._groups, sizes = text_field, [], []
        for path in paths:
            try:
                file = parquet.ParquetFile(path)
            except Exception as error:  # pyarrow raises its own kinds
                raise ValueError(f"{path} is not a Parquet file: {error}") from None
            if text_field not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path} has no column {text_field!r}, it has {names}")
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=[text_field])[text_field]
                sizes.append(_text_bytes(column, f"{path}: column {text_field!r}"))
                self._groups.append((file, group))
        self.num_bytes = np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)
        self._group_end = np.cumsum([len(s) for s in sizes], dtype=np.int64)
        self._last: tuple[int, Any] = (-1, None)

    def read(self, index: int) -> bytes:
        number = int(np.searchsorted(self._group_end, index, side="right"))
        if self._last[0] != number:
            file, group = self._groups[number]
            self._last = (number, file.read_row_group(group, columns=[self.text_field]))
        table = self._last[1]
        return table[self.text_field][int(index - self._group_end[number])].as_py().encode()


class HuggingFaceDocuments(Documents):
    """One document per row of a Hugging Face dataset, by hub name or local path."""

    def __init__(self, name: str, *, text_field: str = "text", split: str = "train") -> None:
        library = _import("datasets", "datasets", f"the Hugging Face dataset {name!r}")
        try:
            if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
                rows = library.load_from_disk(name)
                rows = rows[split] if hasattr(rows, "keys") else rows
            else:
                rows = library.load_dataset(name, split=split)
        except Exception as error:  # network, name, split: the library raises many kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Hugging Face dataset {name!r} cannot be loaded: {reason}") from None
        if text_field not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f"dataset {name!r} has no column {text_field!r}, it has {names}")
        self._rows, self.text_field = rows.select_columns([text_field]), text_field
        tables = self._rows.with_format("arrow").iter(batch_size=1000)
        sizes = [_text_bytes(table[text_field], f"dataset {name!r}") for table in tables]
        self.num_bytes = np.concatenate(sizes) if sizes else np.zeros(0, dtype=np.int64)

    def read(self, index: int) -> bytes:
        return self._rows[int(index)][self.text_field].encode()


def python_sources() -> TextFiles:
    """Python files of the standard library and of the installed packages, sorted by path.

    A long-tailed corpus that every machine with Python has: some bytes to hundreds of kilobytes.
    """
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    return TextFiles(sorted({p for folder in folders for p in _walk(folder, ".py")}))


def open_documents(
    source: str, *, text_field: str = "text", split: str = "train", limit: int | None = None
) -> Documents:
    """Open documents by one string.

    Args:
        source: ``"python"`` (:func:`python_sources`); ``"hf:NAME_OR_PATH"``; a ``.jsonl`` or
            ``.parquet`` file; or a folder of such files, else of text files (all of them).
        text_field: the field or column that holds the text.
        split: split of a Hugging Face dataset.
        limit: use that many documents, spread evenly over the list.

    Raises:
        ValueError: nothing there, no document in it, or the wrong format.
    """
    documents = _open(source, text_field=text_field, split=split)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"the limit of documents must be 1 or more, got {limit}")
        documents = _Some(documents, limit)
    if not len(documents):
        raise ValueError(f"the dataset is empty: no document in {source!r}")
    return documents


def _open(source: str, *, text_field: str, split: str) -> Documents:
    if source == "python":
        return python_sources()
    if source.startswith("hf:"):
        return HuggingFaceDocuments(source[3:], text_field=text_field, split=split)
    path = Path(source)
    if not path.exists():
        raise ValueError(f"source {source!r} is neither a path here nor 'python' nor 'hf:NAME'")
    paths = [path] if path.is_file() else [Path(p) for p in sorted(_walk(path))]
    for ending, kind in ((".jsonl", JsonLines), (".parquet", ParquetRows)):
        if matching := [p for p in paths if p.suffix == ending]:
            return kind(matching, text_field=text_field)
    return TextFiles(paths)


class _Some(Documents):
    """Every so-manieth document of another source."""

    def __init__(self, inner: Documents, limit: int) -> None:
        count = min(limit, len(inner))
        self._inner = inner
        self._which = np.arange(count) * len(inner) // max(count, 1)
        self.num_bytes = inner.num_bytes[self._which]

    def read(self, index: int) -> bytes:
        return self._inner.read(int(self._which[index]))


def _walk(folder: str | Path, ending: str = "") -> Iterator[str]:
    """Paths of the regular, unhidden files under a folder, in no particular order."""
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in files:
            path = os.path.join(where, name)
            if name.endswith(ending) and not name.startswith(".") and os.path.isfile(path):
                yield path


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Line number, byte offset and bytes of each line that is not blank."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)


def _text_bytes(column: Any, where: str) -> np.ndarray:
    """UTF-8 bytes of each string of an Arrow column: int64 ``[rows]``."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{where} holds {kind}, not text; set text_field")
    if column.null_count:
        raise ValueError(f"{where} has {column.null_count} rows without text; remove them")
    return pyarrow.compute.binary_length(column).to_numpy().astype(np.int64)


def _import(module: str, package: str, purpose: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise ValueError(f"{purpose} need the {package} package: pip install {package}") from None
