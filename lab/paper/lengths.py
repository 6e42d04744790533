"""Document lengths of the two data sets: from the hub, from local files, or fitted.

Where neither the hub nor files can be had, lengths are drawn from a lognormal distribution whose
two parameters were fitted to the reference batches (``lab/data/planner_batches.json``); such
lengths are labelled ``fitted`` in everything made from them.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcp.data.batching import TokenBudgetBatches
from dcp.data.tokenizers import open_tokenizer

HUB = ("huggingface.co", 443)
HUB_TOKENIZER = "gpt2"  # the published lengths are those of its byte-pair encoding
MOST_TOKENS = 131072  # longest document, as published
FULL = 0.75  # a batch that is less full is skipped, as published
FITTED_COUNT = 10_000


@dataclass(frozen=True)
class Dataset:
    """A data set by its hub name; ``median`` and ``sigma`` are of the fitted lognormal lengths."""

    title: str
    hub: str
    field: str
    median: float
    sigma: float


DATASETS = {
    "longalign": Dataset("LongAlign", "THUDM/LongAlign-10k", "messages", 9221, 0.66),
    "ldc": Dataset(
        "LongDataCollections", "jchenyu/Long-Data-Collections-sample-10000", "text", 2507, 1.31
    ),
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of each document of a data set, and where they come from."""

    data: str
    source: str
    tokens: np.ndarray


def document_lengths(
    data: str, cache: Path, *, files: Path | None = None, tokenizer: str | None = None
) -> Lengths:
    """Lengths of one of :data:`DATASETS`, counted once and kept in the folder ``cache``.

    Args:
        files: folder with ``DATA.json`` (a list of lengths), ``DATA.jsonl`` or ``DATA.parquet``.
        tokenizer: ``"bytes"`` or a Hugging Face tokenizer; by default ``gpt2`` for the hub's
            documents and bytes for those of local files.

    Raises ``ValueError`` for an unknown name, or files without the data set or its text field.
    """
    if data not in DATASETS:
        raise ValueError(f"data set {data!r} is not one of {', '.join(DATASETS)}")
    kept = cache / f"lengths-{data}.json"
    if files is None and kept.exists():
        known = json.loads(kept.read_text())
        return Lengths(data, known["source"], np.array(known["tokens"], dtype=np.int64))
    found = _from_files(data, files, tokenizer) if files else _from_hub(data, tokenizer)
    if found is None:
        found = fitted_lengths(data)
    cache.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"source": found.source, "tokens": found.tokens.tolist()}))
    return found


def fitted_lengths(data: str, *, count: int = FITTED_COUNT, seed: int = 0) -> Lengths:
    """Lengths drawn from the data set's lognormal distribution, none above ``MOST_TOKENS``."""
    about = DATASETS[data]
    drawn = np.random.default_rng(seed).lognormal(np.log(about.median), about.sigma, 2 * count)
    tokens = drawn[drawn <= MOST_TOKENS][:count].astype(np.int64) + 1
    return Lengths(data, f"fitted (seed {seed})", tokens)


def make_batches(
    lengths: Lengths,
    *,
    scale: float,
    tokens: int,
    count: int,
    max_seqlen: int | None = None,
    over_long: str = "drop",
    seed: int = 0,
) -> list[list[int]]:
    """Batches of at most ``tokens`` tokens, three quarters full or more, of scaled documents.

    Args:
        scale: every length is multiplied by it.
        max_seqlen: longest document; ``tokens`` by default.
        over_long: what longer ones do: ``"drop"`` (as published), ``"truncate"`` or ``"split"``.

    Raises ``ValueError`` for another ``over_long`` and where no document is short enough.
    """
    longest = min(max_seqlen or tokens, tokens)
    scaled = np.maximum((lengths.tokens * scale).astype(np.int64), 1)
    if over_long == "drop":
        scaled = scaled[scaled <= longest]
    elif over_long == "truncate":
        scaled = np.minimum(scaled, longest)
    elif over_long != "split":
        raise ValueError(f"over_long must be 'drop', 'truncate' or 'split', got {over_long!r}")
    if not len(scaled):
        raise ValueError(f"no document of {lengths.data} x{scale} has {longest} tokens or fewer")
    packed = TokenBudgetBatches(scaled, tokens, max_seqlen=longest, over_long="split", seed=seed)
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < count:
        before = len(batches)
        sizes = ((piece[:, 2] - piece[:, 1]).tolist() for piece in packed.epoch(epoch))
        batches += [size for size in sizes if sum(size) >= FULL * tokens]
        if len(batches) == before:
            raise ValueError(f"{lengths.data} x{scale} has too few documents for {tokens} tokens")
        epoch += 1
    return batches[:count]


# --------------------------------------------------------------------------- sources


def _from_hub(data: str, tokenizer: str | None) -> Lengths | None:
    """None, and a line that says why, where the hub or what reads it cannot be had."""
    about, name = DATASETS[data], tokenizer or HUB_TOKENIZER
    try:
        socket.create_connection(HUB, timeout=3).close()
        from datasets import load_dataset
        from transformers import AutoTokenizer

        rows = load_dataset(about.hub, split="train")
        if name != "bytes":
            AutoTokenizer.from_pretrained(name)  # into the local cache
        counted = _count(rows, about.field, name)
    except Exception as error:  # no network, no package, no such data: the libraries raise many
        reason = " ".join(str(error).split())[:200]
        print(f"{about.hub} cannot be read ({reason}); its lengths are fitted", file=sys.stderr)
        return None
    return Lengths(data, f"hub {about.hub}, {name}", counted)


def _from_files(data: str, folder: Path, tokenizer: str | None) -> Lengths:
    name, field = tokenizer or "bytes", DATASETS[data].field
    for ending, rows in ((".json", None), (".jsonl", _json_lines), (".parquet", _parquet)):
        path = folder / f"{data}{ending}"
        if not path.exists():
            continue
        if rows is None:
            tokens = np.array(json.loads(path.read_text()))
            if tokens.ndim != 1 or tokens.dtype.kind != "i" or (tokens < 0).any():
                raise ValueError(f"{path} is not a list of lengths")
            return Lengths(data, f"file {path.name}", tokens.astype(np.int64))
        return Lengths(data, f"file {path.name}, {name}", _count(rows(path), field, name))
    raise ValueError(f"{folder} has no {data}.json, {data}.jsonl or {data}.parquet")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from (json.loads(line) for line in file if line.strip())


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    for part in ParquetFile(path).iter_batches():
        yield from part.to_pylist()


def _count(rows: Iterable[dict[str, Any]], field: str, tokenizer: str) -> np.ndarray:
    """Tokens of each row's text."""
    encode = open_tokenizer(tokenizer).encode
    return np.array([len(encode(_text(row, field))) for row in rows], dtype=np.int64)


def _text(row: dict[str, Any], field: str) -> bytes:
    """The text under ``field`` (else ``text``); of a conversation, all that is said."""
    value = row.get(field, row.get("text"))
    if isinstance(value, list):
        value = "\n".join(f"{turn['role']}\n{turn['content']}" for turn in value)
    if not isinstance(value, str):
        raise ValueError(f"a document has no text under {field!r}, it has {', '.join(row)}")
    return value.encode()
