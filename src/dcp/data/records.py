"""Whole records of files: what chats and preference pairs are read from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from dcp.data.files import JSON, PARQUET, find_files, kind_of_files
from dcp.data.sources import JsonRecords, ParquetTables, hugging_face_rows


class JsonObjects(JsonRecords, Sequence[Any]):  # type: ignore[misc]
    """The objects of JSON files, by index; places and copies as :class:`JsonRecords` has them."""

    def __getitem__(self, index: Any) -> Any:
        return json.loads(self.read(range(len(self))[index]))

    def _field_of(self, record: Any, where: str) -> bytes:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no JSON object but {record!r:.40}: remove it")
        return json.dumps(record).encode()


class ParquetRecords(Sequence[Any]):
    """The rows of Parquet files as mappings, by index; one row group is in memory."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._tables = ParquetTables(paths)

    def __len__(self) -> int:
        return int(self._tables.group_end[-1])

    def __getitem__(self, index: Any) -> Any:
        table, row = self._tables.find(range(len(self))[index])
        return table.slice(row, 1).to_pylist()[0]


def holds_records(source: str) -> bool:
    """Whether a source of :func:`dcp.data.open_documents` has records: JSON, Parquet, or a Hugging
    Face dataset; else its files are texts."""
    if source == "python" or source.startswith("hf:"):
        return source != "python"
    return kind_of_files(find_files(source), source) in (JSON, PARQUET)


def open_records(source: Any, *, split: str = "train") -> Any:
    """Records by index, or a stream of them.

    Args:
        source: a file, folder or pattern of JSON or Parquet, as :func:`dcp.data.open_documents`
            takes them; ``"hf:NAME_OR_PATH"``; or records, which are returned as they are:
            anything with length and index, or that can be iterated.
        split: split of a Hugging Face dataset.

    Raises:
        ValueError: nothing there, no JSON or Parquet, or a file that is damaged or empty.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    source = os.fspath(source)
    if source.startswith("hf:"):
        return hugging_face_rows(source[3:], split=split)
    paths = find_files(source)
    kind = kind_of_files(paths, source)
    if kind == JSON:
        return JsonObjects(paths)
    if kind == PARQUET:
        return ParquetRecords(paths)
    found = paths[0] if paths else "no file at all"
    raise ValueError(f"{source!r} holds {found}: records are read from .jsonl, .json and .parquet")
