"""Where documents come from: each source lists its documents cheaply and reads them one by one."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np

from dcp.data.files import (
    BYTE_ORDER_MARK,
    JSON,
    PARQUET,
    TEXT,
    PinnedFile,
    find_files,
    first_line,
    import_or_refuse,
    kind_of_files,
    parsed_json,
    walk,
)

# A document's file (None: the copies), its offset there, and its bytes there.
_Place = tuple[PinnedFile | None, int, int]


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
    """One document per file, in the order of the given paths: UTF-8 text, perhaps compressed."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._files = [PinnedFile(path) for path in paths]
        self.num_bytes = np.array([len(file.text()) for file in self._files], dtype=np.int64)

    def read(self, index: int) -> bytes:
        return self._files[index].text()


class PythonSources(Documents):
    """Python files of the standard library and of the installed packages, sorted by path.

    A long-tailed corpus that every machine with Python has: some bytes to hundreds of kilobytes.
    The bytes are those of the files, also where an old file is no UTF-8.
    """

    def __init__(self) -> None:
        folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
        found = {p for folder in folders for p in walk(folder, follow=False) if p.endswith(".py")}
        self.paths = [path for path in sorted(found) if os.path.isfile(path)]
        self._files = [PinnedFile(path) for path in self.paths]
        self.num_bytes = np.array([file.size for file in self._files], dtype=np.int64)

    def read(self, index: int) -> bytes:
        with self._files[index].open() as file:
            return file.read()


class JsonRecords(Documents):
    """One document per record of JSON files: the string under ``text_field``.

    A file holds one record a line, or one array of records. The texts of arrays and of compressed
    files are copied into a nameless temporary file, as they cannot be read again by their place.
    """

    def __init__(self, paths: Iterable[str], *, text_field: str = "text") -> None:
        self.text_field = text_field
        self._copies: IO[bytes] = TemporaryFile()  # noqa: SIM115, it lives as long as this
        self._places: list[_Place] = []
        num_bytes: list[int] = []
        for path in paths:
            before = len(num_bytes)
            for text, place in self._documents(PinnedFile(path)):
                self._places.append(place or (None, self._copies.tell(), len(text)))
                if place is None:
                    self._copies.write(text)
                num_bytes.append(len(text))
            if len(num_bytes) == before:
                raise ValueError(f"{path} is empty: remove it, or write it again")
        self._copies.flush()
        self.num_bytes = np.array(num_bytes, dtype=np.int64)

    def read(self, index: int) -> bytes:
        file, offset, size = self._places[index]
        if file is None:
            return os.pread(self._copies.fileno(), size, offset)
        with file.open() as lines:
            lines.seek(offset)
            return self._text(lines.read(size), file.path)

    def _documents(self, file: PinnedFile) -> Iterator[tuple[bytes, _Place | None]]:
        """Each text and, where it can be read again by it, its place."""
        offset, begun = 0, False
        with file.open() as lines:
            for number, line in enumerate(lines, start=1):
                content = line.removeprefix(BYTE_ORDER_MARK).strip()
                if not begun and content.startswith(b"["):
                    records = parsed_json(line + lines.read(), file.path, "JSON array")
                    for count, record in enumerate(records, start=1):
                        yield self._field_of(record, f"{file.path}, record {count},"), None
                    return
                if content:
                    place = None if file.packed else (file, offset, len(line))
                    yield self._text(line, f"{file.path}:{number}"), place
                    begun = True
                offset += len(line)

    def _text(self, line: bytes, where: str) -> bytes:
        return self._field_of(parsed_json(line, where, "JSON line"), where)

    def _field_of(self, record: Any, where: str) -> bytes:
        name = self.text_field
        if not isinstance(record, dict) or name not in record:
            found = f"fields {', '.join(record)}" if isinstance(record, dict) else repr(record)[:40]
            raise ValueError(f"{where} has no text under {name!r} but {found}; set text_field")
        if not isinstance(text := record[name], str):
            raise ValueError(f"{where} has no text under {name!r} but {text!r:.40}: remove it")
        try:
            return text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair
            raise ValueError(f"{where} has text that is no Unicode: {error.reason}") from None


class ParquetTables:
    """Row groups of Parquet files, one after another; keeps the last one that was read.

    Args:
        paths: the files; ``ValueError`` for one that is damaged or has no rows.
        columns: which to read; None: all. ``ValueError`` where a file has not all of them.

    Attributes:
        group_end: rows up to the end of each row group, int64.
    """

    def __init__(self, paths: Iterable[str], *, columns: list[str] | None = None) -> None:
        self._parquet = import_or_refuse("pyarrow.parquet", "pyarrow", "Parquet files")
        self._columns, rows = columns, []
        self._groups: list[tuple[PinnedFile, Any, int]] = []  # file, its metadata, row group
        for path in paths:
            file = PinnedFile(path)
            with closing(self._open(file)) as opened:
                names, metadata = opened.schema_arrow.names, opened.metadata
            for name in columns or ():
                if name not in names:
                    raise ValueError(f"{path} has no column {name!r} but {', '.join(names)}")
            if not metadata.num_rows:
                raise ValueError(f"{path} is empty: remove it, or write it again")
            for group in range(metadata.num_row_groups):
                self._groups.append((file, metadata, group))
                rows.append(metadata.row_group(group).num_rows)
        self.group_end = np.cumsum(rows, dtype=np.int64)
        self._last: tuple[int, Any] = (-1, None)

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Each row group, with its name for messages."""
        for file, metadata, group in self._groups:
            yield f"{file.path}, row group {group}", self._table(file, metadata, group)

    def find(self, index: int) -> tuple[Any, int]:
        """The table that holds a row, and the row's number in it."""
        number = int(np.searchsorted(self.group_end, index, side="right"))
        if self._last[0] != number:
            self._last = (number, self._table(*self._groups[number]))
        table = self._last[1]
        return table, int(index - self.group_end[number]) + len(table)

    def _open(self, file: PinnedFile, metadata: Any = None) -> Any:
        file.check()
        try:
            return self._parquet.ParquetFile(file.path, metadata=metadata)
        except Exception as error:  # pyarrow raises its own kinds
            reason = first_line(error)
            raise ValueError(f"{file.path} is not a Parquet file: {reason}") from None

    def _table(self, file: PinnedFile, metadata: Any, group: int) -> Any:
        with closing(self._open(file, metadata)) as opened:
            try:
                return opened.read_row_group(group, columns=self._columns)
            except Exception as error:  # pyarrow raises its own kinds
                reason = first_line(error)
                raise ValueError(f"{file.path}, row group {group} is damaged: {reason}") from None


class ParquetRows(Documents):
    """One document per row of Parquet files: the string column ``text_field``.

    Reads one row group at a time and keeps the last one.
    """

    def __init__(self, paths: Iterable[str], *, text_field: str = "text") -> None:
        self._tables, self.text_field = ParquetTables(paths, columns=[text_field]), text_field
        self.num_bytes = _joined(
            _text_bytes(table[text_field], where, text_field)
            for where, table in self._tables.tables()
        )

    def read(self, index: int) -> bytes:
        table, row = self._tables.find(index)
        return table[self.text_field][row].as_py().encode()


class HuggingFaceDocuments(Documents):
    """One document per row of a Hugging Face dataset, by hub name or local path."""

    def __init__(self, name: str, *, text_field: str = "text", split: str = "train") -> None:
        rows = hugging_face_rows(name, split=split)
        if text_field not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f"dataset {name!r} has no column {text_field!r} but {names}")
        self._rows, self.text_field = rows.select_columns([text_field]), text_field
        tables = self._rows.with_format("arrow").iter(batch_size=1000)
        self.num_bytes = _joined(
            _text_bytes(table[text_field], f"dataset {name!r}", text_field, first=1000 * number)
            for number, table in enumerate(tables)
        )

    def read(self, index: int) -> bytes:
        return self._rows[int(index)][self.text_field].encode()


def hugging_face_rows(name: str, *, split: str) -> Any:
    """A Hugging Face dataset, by hub name or local path; ``ValueError`` where it cannot be had."""
    library = import_or_refuse("datasets", "datasets", f"the Hugging Face dataset {name!r}")
    try:
        if (Path(name) / "state.json").exists() or (Path(name) / "dataset_dict.json").exists():
            rows = library.load_from_disk(name)
            return rows[split] if hasattr(rows, "keys") else rows
        return library.load_dataset(name, split=split)
    except Exception as error:  # network, name, split: the library raises many kinds
        raise ValueError(
            f"Hugging Face dataset {name!r} cannot be loaded: {first_line(error)}"
        ) from None


def open_documents(
    source: str | os.PathLike[str],
    *,
    text_field: str = "text",
    split: str = "train",
    limit: int | None = None,
) -> Documents:
    """Open documents by one string.

    Args:
        source: ``"python"`` (:class:`PythonSources`); ``"hf:NAME_OR_PATH"``; a file, a folder, or
            a pattern such as ``data/**/*.jsonl``. JSON (``.jsonl``, ``.ndjson``, ``.json``) holds
            one record a line or an array of them, Parquet (``.parquet``, ``.pq``) one a row; any
            other file is a document, if it is UTF-8 text. JSON and text may be compressed (``.gz``,
            ``.bz2``, ``.xz``, ``.zst``). Files are taken in the order of their paths.
        text_field: the field or column that holds the text.
        split: split of a Hugging Face dataset.
        limit: use at most that many documents, spread evenly over the list.

    Raises:
        ValueError: nothing there, files of several kinds, a file that is damaged, empty or of a
            kind not read, a record without text; with the file and its line or row.
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"the limit of documents must be 1 or more, got {limit!r}")
    documents = _open(os.fspath(source), text_field=text_field, split=split)
    if limit is not None:
        documents = _Some(documents, limit)
    if not documents.num_bytes.any():
        raise ValueError(f"the dataset is empty: there is no text in {os.fspath(source)!r}")
    return documents


def _open(source: str, *, text_field: str, split: str) -> Documents:
    if source == "python":
        return PythonSources()
    if source.startswith("hf:"):
        return HuggingFaceDocuments(source[3:], text_field=text_field, split=split)
    paths = find_files(source)
    kind = kind_of_files(paths, source)
    if kind == TEXT:
        return TextFiles(paths)
    return {JSON: JsonRecords, PARQUET: ParquetRows}[kind](paths, text_field=text_field)


class _Some(Documents):
    """Every so-manieth document of another source."""

    def __init__(self, inner: Documents, limit: int) -> None:
        count = min(limit, len(inner))
        self._inner = inner
        self._which = np.arange(count) * len(inner) // max(count, 1)
        self.num_bytes = inner.num_bytes[self._which]

    def read(self, index: int) -> bytes:
        return self._inner.read(int(self._which[index]))


def _text_bytes(column: Any, where: str, name: str, *, first: int = 0) -> np.ndarray:
    """UTF-8 bytes of each string of an Arrow column, int64 ``[rows]``, once it is checked.

    Args:
        where, first: what holds the column, and the number of its first row there, from 0.
    """
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise ValueError(f"{where}: column {name!r} holds {kind}, not text; set text_field")
    if column.null_count:
        row = first + pyarrow.compute.index(column.is_null(), True).as_py()
        raise ValueError(f"{where}, row {row} has no text under {name!r}: remove it")
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            reason = f"{first_line(error)}, of the {len(chunk)} from row {first} on"
            raise ValueError(f"{where} has no text under {name!r}: {reason}") from None
        first += len(chunk)
    return pyarrow.compute.binary_length(column).to_numpy().astype(np.int64)


def _joined(sizes: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *sizes])
