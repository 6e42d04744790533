"""The books of a cache as plain arrays, and back, checked."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from dcp.inference.books import Books
from dcp.inference.held import RANK_TYPE, Held, SequenceId, Table
from dcp.ragged import split
from dcp.received import check_columns, require, within


def names_of_arrays(num_kinds: int) -> list[str]:
    """Of :func:`to_arrays`."""
    each = [f"{what} {kind}" for kind in range(num_kinds) for what in ("first", "pages")]
    return ["num_tokens", "owner", *each]


def to_arrays(books: Books) -> dict[str, np.ndarray]:
    """All sequences: tokens and their ranks; for each kind of layers, what is forgotten, and the
    pages of all ranks."""
    known = [books.known(name) for name in books.sequences]
    none = [np.zeros(0, dtype=np.int64)]
    arrays = {
        "num_tokens": np.array([of.num_tokens for of in known], dtype=np.int64),
        "owner": np.concatenate([*none, *(of.owners(0, of.num_tokens) for of in known)]),
    }
    for kind in range(len(books.kinds)):
        tables = [of.tables[kind] for of in known]
        pages = [page for table in tables for of in table.pages for page in of]
        arrays[f"first {kind}"] = np.array([of.first for of in tables], dtype=np.int64)
        arrays[f"pages {kind}"] = np.array(pages, dtype=np.int64)
    return arrays


def from_arrays(books: Books, names: list[SequenceId], arrays: dict[str, np.ndarray]) -> None:
    """Fill empty books with what :func:`to_arrays` made of others; ``WireError`` for what cannot be
    that."""
    num_tokens, owner = arrays["num_tokens"], arrays["owner"]
    check_columns(("num_tokens",), num_tokens)
    require(num_tokens.shape == (len(names),), f"num_tokens has shape {num_tokens.shape}")
    require(owner.shape == (num_tokens.sum(),), f"owner has shape {owner.shape}")
    require(within(owner, 0, books.num_ranks), "owner names other ranks")
    owners = split(owner, num_tokens)
    held = [np.bincount(of, minlength=books.num_ranks) for of in owners]
    tables = [_tables(books, kind, owners, held, arrays) for kind in range(len(books.kinds))]
    known = {}
    for index, (name, of) in enumerate(zip(names, owners, strict=True)):
        of_kinds = tuple(table[index] for table in tables)
        known[name] = Held(array(RANK_TYPE, of.tolist()), held[index], of_kinds)
    books.undo(known)


def _tables(
    books: Books,
    kind: int,
    owners: list[np.ndarray],
    held: list[np.ndarray],
    arrays: dict[str, np.ndarray],
) -> list[Table]:
    """Of each sequence."""
    first, pages, size = arrays[f"first {kind}"], arrays[f"pages {kind}"], books.page_size
    check_columns((f"first {kind}",), first)
    require(first.shape == (len(owners),), f"first {kind} has shape {first.shape}")
    most = [books.kinds[kind].first(len(of)) for of in owners]
    require((first <= np.array(most, dtype=np.int64)).all(), f"first {kind} forgets what is seen")
    gone = [
        np.bincount(of[:start], minlength=books.num_ranks)
        for of, start in zip(owners, first, strict=True)
    ]
    counts = [-(-has // size) - lost // size for has, lost in zip(held, gone, strict=True)]
    require(
        pages.shape == (sum(int(of.sum()) for of in counts),)
        and within(pages, 0, books.num_pages_of(kind)),
        f"pages {kind} has shape {pages.shape}, or names other pages",
    )
    tables, rest = [], iter(pages.tolist())
    for start, lost, count in zip(first.tolist(), gone, counts, strict=True):
        of_ranks = tuple(tuple(next(rest) for _ in range(many)) for many in count.tolist())
        tables.append(Table(start, lost, of_ranks))
    _check_last(tables, held, size)
    return tables


def _check_last(tables: list[Table], held: list[np.ndarray], size: int) -> None:
    """A page that is not full may be gone on with, so it must be of one sequence alone."""
    for rank in range(len(held[0]) if held else 0):
        users = Counter(page for table in tables for page in table.pages[rank])
        each = zip(tables, held, strict=True)
        last = [table.pages[rank][-1] for table, has in each if has[rank] % size]
        require(all(users[page] == 1 for page in last), "a page that is not full is used twice")
