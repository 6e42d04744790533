"""What a sample says: its tokens, labels, positions and further fields, read by one rule.

Planning ranks count labels with it, every rank reads its documents with it, so both see the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORED = -100  # a label that does not count, as torch's cross-entropy has it
LOSS_MASKS = ("loss_mask", "assistant_masks", "assistant_tokens_mask", "completion_mask")
KNOWN = (
    "input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "group_id", *LOSS_MASKS
)  # fmt: skip
KINDS = ("bool", "int64", "float32")  # of fields; a batch has the last of those of its samples
Kinds = dict[str, tuple[str, tuple[int, ...]]]  # of each field: dtype, shape of a token's value


@dataclass(frozen=True, eq=False)
class Sample:
    """A document as the loader understands it, padding left out.

    Attributes:
        tokens: int64 ``[n]``.
        labels: of each token, that is the next token or -100: int64 ``[n]``.
        positions: the sample's ``position_ids``, int64 ``[n]``; None where it has none.
        labels_are_final: they were given shifted, and no end of a segment changes them.
        fields: of the user's own, ``[n]`` or ``[n, …]`` each, of a dtype in ``KINDS``.
        group: its ``group_id``, None without.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray | None = None
    labels_are_final: bool = False
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    group: Any = None


@dataclass(frozen=True)
class SampleFormat:
    """Which samples are understood: token vectors, or mappings with ``input_ids`` and maybe

    - ``attention_mask``: zeros are padding, on either side, and leave the sample;
    - ``labels``: beside their tokens, -100 where they do not count; without, the tokens themselves;
    - ``loss_mask``, ``completion_mask``, ``assistant_masks``, ``assistant_tokens_mask``: beside
      their tokens; a token is a label only where all that are there have 1;
    - ``shift_labels``: the labels as they are, each beside the token that predicts it;
    - ``position_ids``: a token that does not lie behind the one before it begins a segment;
    - ``group_id``: samples with the same one come in one batch.

    None counts as absent. Any other key is refused, unless it is named here.

    Args:
        fields: numbers per token (``[n]`` or ``[n, …]``), or one for all tokens of the sample. They
            become bool, int64 or float32, by their kind.
        ignore: keys that are for others to read.
        vocab_size: a token or label from there on is refused; None: unknown.
    """

    fields: Sequence[str] = ()
    ignore: Sequence[str] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("fields", "ignore"):
            object.__setattr__(self, name, as_names(getattr(self, name)))
        if taken := [name for name in self.fields if name in (*KNOWN, *self.ignore)]:
            raise ValueError(
                f"fields names {taken[0]!r}, which the loader reads itself or is told to ignore: "
                f"give the field another name"
            )

    def read(self, raw: Any, document: int) -> Sample:
        """The sample of a document; ``ValueError``, with document and field, for any other."""
        entries = self._entries(raw, document)

        def integers(name: str, like: np.ndarray | None = None) -> np.ndarray | None:
            return None if name not in entries else _integers(entries[name], name, document, like)

        tokens = integers("input_ids")
        assert tokens is not None
        own, final = integers("labels", tokens), integers("shift_labels", tokens)
        positions = integers("position_ids", tokens)
        masks = [_mask(entries, name, document, tokens) for name in LOSS_MASKS if name in entries]
        fields = {name: _field(entries, name, document, len(tokens)) for name in self.fields}
        kept = _kept(entries, document, tokens)
        tokens, fields = tokens[kept], {name: of[kept] for name, of in fields.items()}
        own, final, positions = (x if x is None else x[kept] for x in (own, final, positions))
        self._check("input_ids", tokens, document)
        for name, labels in (("labels", own), ("shift_labels", final)):
            if labels is not None:
                self._check(name, labels[labels != IGNORED], document)
        if positions is not None and (positions < 0).any():
            raise ValueError(f"position_ids of document {document} has {positions.min()}, below 0")
        masks = [mask[kept] for mask in masks]
        segments = positions if final is None else None
        labels = _shifted(tokens if own is None else own, masks, segments)
        if final is not None:
            labels = final if own is None and not masks else _agreed(labels, final, own, document)
        return Sample(tokens, labels, positions, final is not None, fields, entries.get("group_id"))

    def _entries(self, raw: Any, document: int) -> dict[str, Any]:
        """The sample's values by key: those that are there, and all of them known."""
        if not isinstance(raw, Mapping):
            raw = {"input_ids": raw}
        entries = {k: v for k, v in raw.items() if v is not None and k not in self.ignore}
        if "input_ids" not in entries:
            keys = ", ".join(map(str, raw)) or "nothing"
            raise ValueError(f"document {document} has no 'input_ids', it has {keys}")
        for name in entries:
            if name not in KNOWN and name not in self.fields:
                raise ValueError(
                    f"unknown field {name!r} of document {document}: name it in fields=({name!r},) "
                    f"to have it sharded like tokens, or remove it, or leave it to others with "
                    f"ignore=({name!r},)"
                )
        if missing := [name for name in self.fields if name not in entries]:
            raise ValueError(
                f"document {document} has no {missing[0]!r}, which the loader's fields name: give "
                f"it to every sample"
            )
        return entries

    def _check(self, name: str, ids: np.ndarray, document: int) -> None:
        wrong = ids < 0 if self.vocab_size is None else (ids < 0) | (ids >= self.vocab_size)
        if wrong.any():
            limit = "" if self.vocab_size is None else f" and below vocab_size={self.vocab_size}"
            raise ValueError(
                f"{name} of document {document} has {ids[wrong][0]}: ids must be 0 or more{limit}"
            )


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names, or one."""
    return (names,) if isinstance(names, str) else tuple(names)


def segment_begins(positions: np.ndarray) -> np.ndarray:
    """Tokens, but the first, that do not lie behind the one before them: int64."""
    begins: np.ndarray = np.flatnonzero(np.diff(positions) <= 0) + 1
    return begins


def _shifted(own: np.ndarray, masks: list[np.ndarray], positions: np.ndarray | None) -> np.ndarray:
    """Of each token the label beside the next one, if it counts and lies in the same segment."""
    labels = np.full_like(own, IGNORED)
    counts = np.logical_and.reduce(masks) if masks else np.ones(len(own), dtype=bool)
    labels[:-1] = np.where(counts, own, IGNORED)[1:]
    if positions is not None:
        labels[segment_begins(positions) - 1] = IGNORED
    return labels


def _agreed(
    labels: np.ndarray, final: np.ndarray, own: np.ndarray | None, document: int
) -> np.ndarray:
    """``shift_labels`` less what ``labels`` or a mask leave out; they must not contradict."""
    wrong = (labels != IGNORED) & (final != IGNORED) & (labels != final)
    if own is not None and wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"labels and shift_labels of document {document} disagree: behind token {at} comes "
            f"{labels[at]} by the one and {final[at]} by the other: remove one of them"
        )
    keep = labels != IGNORED
    keep[-1:] = True  # what lies behind the last token, only shift_labels can tell
    return np.where(keep, final, IGNORED)


def _array(value: Any, name: str, document: int) -> np.ndarray:
    """Numbers, whatever holds them."""
    if hasattr(value, "detach"):  # a tensor, of any device; numpy has no bfloat16
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name} of document {document} is not an array: {error}") from None
    return array


def _integers(value: Any, name: str, document: int, like: np.ndarray | None = None) -> np.ndarray:
    """A vector of integers, as long as the tokens: int64."""
    array = _array(value, name, document)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} of document {document} must be a vector of integers, got {array.dtype} of "
            f"shape {array.shape}"
        )
    _same_length(array, name, document, array if like is None else like)
    if array.size and array.dtype.kind == "u" and int(array.max()) >= 1 << 63:
        raise ValueError(f"{name} of document {document} has {array.max()}, beyond int64")
    return array.astype(np.int64)


def _mask(entries: Mapping[str, Any], name: str, document: int, tokens: np.ndarray) -> np.ndarray:
    """A vector of 0 and 1, of any dtype, as long as the tokens: bool."""
    array = _array(entries[name], name, document)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        raise ValueError(
            f"{name} of document {document} must be a vector of 0 and 1, got {array.dtype} of "
            f"shape {array.shape}"
        )
    _same_length(array, name, document, tokens)
    wrong = (array != 0) & (array != 1)
    if wrong.any():
        raise ValueError(
            f"{name} of document {document} must hold 0 and 1 only, got {array[wrong][0]}"
        )
    return array.astype(bool)


def _field(entries: Mapping[str, Any], name: str, document: int, length: int) -> np.ndarray:
    """A field of the user's own: a value per token, of a dtype in ``KINDS``."""
    array = _array(entries[name], name, document)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"field {name!r} of document {document} must hold numbers, got {array.dtype} of shape "
            f"{array.shape}"
        )
    array = np.full(length, array) if array.ndim == 0 else array
    _same_length(array, f"field {name!r}", document, np.empty(length))
    dtype = {"b": "bool", "f": "float32"}.get(array.dtype.kind, "int64")
    return array.astype(dtype)


def _kept(entries: Mapping[str, Any], document: int, tokens: np.ndarray) -> slice:
    """The tokens that are no padding."""
    if "attention_mask" not in entries:
        return slice(None)
    mask = _mask(entries, "attention_mask", document, tokens)
    kept = np.flatnonzero(mask)
    if not len(kept):
        return slice(0, 0)
    first, stop = int(kept[0]), int(kept[-1]) + 1
    if stop - first != len(kept):
        hole = first + int(np.argmin(mask[first:stop]))
        raise ValueError(
            f"attention_mask of document {document} is 0 at token {hole}, between tokens that "
            f"count: only padding on either side can be left out; let mask_fn hide what lies inside"
        )
    return slice(first, stop)


def _same_length(array: np.ndarray, name: str, document: int, tokens: np.ndarray) -> None:
    if len(array) != len(tokens):
        raise ValueError(
            f"{name} of document {document} has {len(array)} entries for {len(tokens)} tokens: "
            f"give one per token"
        )
