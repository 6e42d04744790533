"""What is to be computed: the sequences of a batch, their masks, the shape of attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from dcp.checks import one_of, positive, shown, whole, whole_numbers
from dcp.masks import AttnMask, named_mask
from dcp.slices import shift_slices, slice_area

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LSE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 4, "float16": 4}
MOST_TOKENS = 2**31 - 1  # of a batch: pairs, up to their square, are counted in 64 bits
MOST_WIDTH = 2**16  # heads, and numbers of a head: rows, bytes and pairs stay within 64 bits


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Heads of one attention layer and the dtype its tensors travel in.

    ``num_kv_heads`` divides ``num_heads`` (equal: MHA; 1: MQA; between: GQA). ``head_dim`` is the
    width of queries and keys, ``value_dim`` that of values and outputs; None: the same. ``dtype``
    is a name or a ``torch.dtype``, and is kept as the name.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    value_dim: int = cast(int, None)

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        for name in ("num_heads", "num_kv_heads", "head_dim", "value_dim"):
            size = whole(name, getattr(self, name), least=1, most=MOST_WIDTH)
            object.__setattr__(self, name, size)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        object.__setattr__(self, "dtype", str(self.dtype).rpartition(".")[2])
        one_of("dtype", self.dtype, DTYPE_BYTES)

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def exact_bytes(self) -> int:
        """Bytes of a number that is summed on its way: of a log-sum-exp, or a gradient that hops
        from rank to rank."""
        return LSE_BYTES[self.dtype]

    @property
    def q_token_bytes(self) -> int:
        """Bytes of one token's queries, all heads."""
        return self.num_heads * self.head_dim * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's keys and values, all KV heads."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype_bytes

    @property
    def value_token_bytes(self) -> int:
        """Bytes of one token's outputs, or their gradients, all query heads."""
        return self.num_heads * self.value_dim * self.dtype_bytes

    @property
    def out_token_bytes(self) -> int:
        """Bytes of one token's partial output with its log-sum-exp, all heads."""
        return self.value_token_bytes + self.num_heads * self.exact_bytes

    def kv_shape(self, kv_heads: int | None = None) -> tuple[int, ...]:
        """Shape of one token's keys and values: ``(2, kv_heads, head_dim)``, keys first, or where
        the widths differ ``(kv_heads, head_dim + value_dim)``, each head's key first."""
        heads = self.num_kv_heads if kv_heads is None else kv_heads
        if self.head_dim == self.value_dim:
            return 2, heads, self.head_dim
        return heads, self.head_dim + self.value_dim


class SequenceBatch:
    """Sequences with one mask each, or several named masks where layers differ.

    Args:
        seqlens: tokens of each sequence; 0 is legal.
        masks: a mask name for all (``"causal"``), a list with an :class:`AttnMask` or a name per
            sequence (for one sequence the mask itself will do), or ``{"global": …, "local": …}``
            with any of these under each name.
        weights: with named masks, how many layers use each (default 1 each); balance is over the
            weighted sum.
        cached: where the keys and values of each sequence's first tokens lie already: tokens per
            rank, int ``[num_sequences, num_ranks]``. Those tokens have no queries: a mask is
            (seqlen - cached) x seqlen. They are numbered rank by rank, whatever positions they
            hold, so masks should show all of them alike, as causality does.

    Raises ``ValueError`` for a length that is no whole number, 0 or more, for more than
    :data:`MOST_TOKENS` tokens, and for a mask of the wrong size.
    """

    def __init__(
        self,
        seqlens: Sequence[int] | np.ndarray,
        masks: str | Sequence[AttnMask | str] | Mapping[str, Any] = "causal",
        *,
        weights: Mapping[str, float] | None = None,
        cached: Sequence[Sequence[int]] | np.ndarray | None = None,
    ) -> None:
        self.seqlens = whole_numbers("seqlens", seqlens, most=MOST_TOKENS)
        if self.seqlens.sum() > MOST_TOKENS:
            raise ValueError(
                f"a batch has at most {MOST_TOKENS:,} tokens, these seqlens sum to "
                f"{int(self.seqlens.sum()):,}: give several batches"
            )
        none = np.zeros((len(self.seqlens), 0), dtype=np.int64)
        self.cached = none if cached is None else self._checked_cached(cached)
        named = masks if isinstance(masks, Mapping) else {"default": masks}
        if not named:
            raise ValueError("masks is an empty mapping: name at least one mask")
        if wrong := [name for name in named if not isinstance(name, str)]:
            raise ValueError(f"masks must have strings as names, got {shown(wrong[0])}")
        self.masks = {name: self._one_per_sequence(name, given) for name, given in named.items()}
        self.weights = self._checked_weights({} if weights is None else weights)

    @property
    def num_tokens(self) -> int:
        """Tokens with queries: all but the cached ones."""
        return int(self.seqlens.sum() - self.cached.sum())

    @property
    def num_cached(self) -> np.ndarray:
        """Tokens of each sequence that are cached, its first ones: int64 ``[n]``."""
        num_cached: np.ndarray = self.cached.sum(axis=1)
        return num_cached

    @property
    def offsets(self) -> np.ndarray:
        """Global index of each sequence's first key, and the total: int64 ``[n + 1]``."""
        return np.concatenate([[0], np.cumsum(self.seqlens)])

    @property
    def mask_names(self) -> list[str]:
        return list(self.masks)

    def area(self, name: str | None = None) -> int:
        """(query, key) pairs of one mask over the batch."""
        return sum(mask.area for mask in self.masks[name or self.mask_names[0]])

    def global_bands(self, name: str) -> np.ndarray:
        """All sequences' slices of one mask in global token coordinates: int64 ``[n, 6]``."""
        sequence, bands = self.local_bands(name)
        key = self.offsets[sequence]
        return shift_slices(bands, key + self.num_cached[sequence], key)

    def local_bands(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """All sequences' slices of one mask: the sequence of each ``[n]``, and they ``[n, 6]``."""
        bands = [mask.bands for mask in self.masks[name]]
        counts = np.array([len(of) for of in bands], dtype=np.int64)
        sequence = np.repeat(np.arange(len(bands)), counts)
        return sequence, np.concatenate([np.zeros((0, 6), dtype=np.int64), *bands])

    def band(self, name: str) -> tuple[int, int, bool]:
        """Least and greatest key - query, by position, of one mask's pairs; true if the mask shows
        all pairs between: a window of 8 is ``(-7, 0, True)``, documents inside samples are not."""
        bands, cached = self.global_bands(name), self.num_cached
        lo, hi = int(bands[:, 4].min(initial=0)), int(bands[:, 5].max(initial=0))
        size, zero = self.seqlens, np.zeros_like(self.seqlens)
        every = np.stack([cached, size, zero, size, zero + lo, zero + hi], axis=1)
        return lo, hi, bool(slice_area(bands).sum() == slice_area(every).sum())

    def reordered(self, order: np.ndarray) -> SequenceBatch:
        """The same sequences and masks in another order."""
        masks = {name: [of[index] for index in order] for name, of in self.masks.items()}
        return SequenceBatch(
            self.seqlens[order], masks, weights=self.weights, cached=self.cached[order]
        )

    def _checked_weights(self, weights: Mapping[str, float]) -> dict[str, float]:
        if not isinstance(weights, Mapping):
            raise ValueError(f"weights must map mask names to numbers, got {shown(weights)}")
        if unknown := {str(name) for name in weights if name not in self.masks}:
            raise ValueError(f"weights name unknown masks: {', '.join(sorted(unknown))}")
        return {name: positive(f"weights[{name!r}]", weights.get(name, 1.0)) for name in self.masks}

    def _checked_cached(self, given: Any) -> np.ndarray:
        count = len(self.seqlens)
        try:
            cached = np.asarray(given)
        except ValueError:  # rows of different lengths
            cached = np.zeros(0)
        if cached.ndim != 2 or len(cached) != count:
            raise ValueError(
                f"cached must be [{count} sequences, num_ranks], its shape is {cached.shape}"
            )
        if cached.size and cached.dtype.kind not in "iu":
            raise ValueError(f"cached must be whole numbers, got {shown(cached.tolist())}")
        if cached.size and not (
            (cached >= 0).all() and (cached.sum(axis=1, dtype=float) <= self.seqlens).all()
        ):
            raise ValueError(
                f"cached tokens must be 0 or more and at most the seqlens {self.seqlens.tolist()}, "
                f"got {cached.tolist()}"
            )
        return cached.astype(np.int64)

    def _one_per_sequence(self, name: str, given: Any) -> list[AttnMask]:
        sizes = list(zip(self.seqlens.tolist(), self.num_cached.tolist(), strict=True))
        if isinstance(given, str):
            made = {size: _named(given, *size) for size in dict.fromkeys(sizes)}
            return [made[size] for size in sizes]  # equal lengths share one mask
        given = [given] if isinstance(given, AttnMask) else given
        if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
            raise ValueError(f"mask {name!r} must be a name or one mask a sequence, got {given!r}")
        given = list(given)
        if len(given) != len(self.seqlens):
            raise ValueError(f"mask {name!r}: {len(given)} masks for {len(self.seqlens)} sequences")
        masks = []
        for index, ((seqlen, cached), mask) in enumerate(zip(sizes, given, strict=True)):
            mask = _named(mask, seqlen, cached) if isinstance(mask, str) else mask
            if not isinstance(mask, AttnMask):
                mask = _ranged(mask, f"mask {name!r} of sequence {index}")
            if (mask.q_len, mask.k_len) != (seqlen - cached, seqlen):
                of_them = f", {cached} of them cached" if cached else ""
                raise ValueError(
                    f"mask {name!r} of sequence {index} is {mask.q_len} x {mask.k_len}, "
                    f"the sequence has {seqlen} tokens{of_them}"
                )
            masks.append(mask)
        return masks

    def __repr__(self) -> str:
        names = ", ".join(self.masks)
        return f"SequenceBatch({len(self.seqlens)} sequences, {self.num_tokens} tokens, {names})"


def _named(name: str, seqlen: int, cached: int) -> AttnMask:
    return named_mask(name, seqlen, cached=cached) if cached else named_mask(name, seqlen)


def _ranged(ranges: Any, what: str) -> AttnMask:
    """The mask of key ranges per query; ``what`` says which it is where they are none."""
    try:
        return AttnMask.from_ranges(ranges)
    except ValueError as error:
        raise ValueError(f"{what} is neither a mask nor a name nor key ranges: {error}") from None
