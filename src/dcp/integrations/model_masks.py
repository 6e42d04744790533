"""The mask that a Hugging Face layer asks for, compared with the one that its plan holds.

transformers describes a mask as a function of (batch, head, query, key) positions. A plan's mask is
known by its band (:meth:`dcp.SequenceBatch.band`). A layer gets what it asks for, or, where the
plan's author restricted causal attention on purpose (documents, shared questions, a sink and a
window), less of it; never keys that it does not ask for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import getclosurevars, isfunction
from typing import Any, NamedTuple

import torch
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface

Rule = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) -> bool tensor
_SAMPLES = (
    48  # positions at either end of a long sequence, and between, at which rules are compared
)


class Band(NamedTuple):
    """Least and greatest key - query that a mask shows; ``whole`` if it shows all between."""

    lo: int
    hi: int
    whole: bool = True

    def named(self, longest: int) -> str:
        if not self.whole:
            return "a mask of other shape" + (" that shows later tokens" if self.hi > 0 else "")
        if self.hi > 0:
            wide = self.hi >= longest - 1
            return "bidirectional attention" + ("" if wide else f" within {self.hi} tokens")
        causal = self.lo <= 1 - longest
        return "causal attention" if causal else f"a sliding window of {1 - self.lo} tokens"


@dataclass(frozen=True)
class Asked:
    """What takes the place of the mask on its way through a model.

    Attributes:
        rule: of positions; None where ``fault`` says why there is none.
        fault: of a mask that no plan can be compared with.
    """

    rule: Rule | None
    fault: str = ""
    _bands: UserDict[int, Band | None] = field(default_factory=UserDict)  # FSDP would copy a dict

    def band(self, longest: int) -> Band | None:
        """The rule in sequences of up to ``longest`` tokens; None if it is no band there."""
        if longest not in self._bands:
            try:
                self._bands[longest] = self._find_band(longest)
            except (IndexError, RuntimeError):  # it reads more than positions
                self._bands[longest] = None
        return self._bands[longest]

    def is_from(self, first: Callable[[int], int], longest: int) -> bool:
        """Whether a token at a position shows all from ``first(position)`` on, up to itself, in
        sequences of up to ``longest`` tokens."""
        if self.rule is None:
            return False
        query = _positions(longest)[:, None]
        begin = torch.tensor([first(each) for each in query.flatten().tolist()])[:, None]
        edges = torch.cat([begin - 1, begin, query, query + 1], dim=1).clamp(0, longest - 1)
        for key in (query.T, edges):
            wanted = (begin <= key) & (key <= query)
            if not torch.equal(self._shown(*torch.broadcast_tensors(query, key)), wanted):
                return False
        return True

    def is_window(self, longest: int) -> bool:
        """A causal one that hides something from a sequence of ``longest`` tokens."""
        band = self.band(longest) if self.rule and longest > 1 else None
        return band is not None and band.hi == 0 and band.lo > 1 - longest

    def _find_band(self, longest: int) -> Band | None:
        last = longest - 1
        lo = bisect_left(range(longest), True, key=lambda key: bool(self._shown(last, key))) - last
        hi = bisect_left(range(longest), True, key=lambda key: not self._shown(0, key)) - 1
        query = _positions(longest)[:, None]
        edges = query + torch.tensor([lo - 1, lo, hi, hi + 1])
        for key in (query.T, edges.clamp(0, last)):
            wanted = (lo <= key - query) & (key - query <= hi)
            if not torch.equal(self._shown(*torch.broadcast_tensors(query, key)), wanted):
                return None
        return Band(lo, hi)

    def _shown(self, query: Any, key: Any) -> torch.Tensor:
        assert self.rule is not None
        first, query, key = torch.tensor(0), torch.as_tensor(query), torch.as_tensor(key)
        return self.rule(first, first, query, key).expand(key.shape)


def _positions(longest: int) -> torch.Tensor:
    """Those at which rules are compared."""
    some = torch.arange(min(longest, _SAMPLES))
    between = torch.linspace(0, longest - 1, _SAMPLES).long()
    return torch.cat([some, longest - 1 - some, between]).unique()


def register_masks(name: str) -> None:
    """Let transformers describe masks to the attention called ``name``; it drops them otherwise."""
    AttentionMaskInterface.register(name, _ask)


def _ask(*, mask_function: Rule, attention_mask: torch.Tensor | None = None, **_: Any) -> Asked:
    if attention_mask is not None and not attention_mask.all():
        hidden = int((attention_mask == 0).sum())
        raise ValueError(
            f"attention_mask hides {hidden} tokens, which dcp attention cannot honour: leave "
            "padding out of the batch, or plan a mask"
        )
    try:
        return Asked(_rule(mask_function))
    except ValueError as error:
        return Asked(None, str(error))


def _rule(function: Rule) -> Rule:
    """A mask function of positions, without the split where local positions jump.

    transformers takes such jumps for packed documents; the plan knows better.
    """
    held = getclosurevars(function).nonlocals
    if "mask_functions" in held:  # of masking_utils.and_masks or or_masks
        parts = [
            _rule(part)
            for part in held["mask_functions"]
            if "packed_sequence_mask" not in getclosurevars(part).nonlocals
        ]
        join = getattr(masking_utils, function.__name__ + "s")
        return parts[0] if len(parts) == 1 else join(*parts)
    if set(held) == {"mask_function", "position_ids"}:
        return _rule(held["mask_function"])
    if set(held) == {"chunk_size", "left_padding"}:
        return masking_utils.chunked_overlay(held["chunk_size"], torch.zeros(1, dtype=torch.int64))
    _refuse_data(function)
    return function


def _refuse_data(function: Rule) -> None:
    for name, value in getclosurevars(function).nonlocals.items():
        if isinstance(value, torch.Tensor):
            raise ValueError(f"its mask depends on the batch's {name}, such as where images are")
        if isfunction(value):
            _refuse_data(value)


def asked_of(layer: Any, mask: Asked | None, window: int | None, is_causal: bool | None) -> Asked:
    """``mask``, or without one what torch's own attention would do for this layer.

    That goes for plain causal masks, too: transformers leaves them out for torch's attention.
    """
    if mask is not None and mask.rule is not masking_utils.causal_mask_function:
        return mask
    if not (getattr(layer, "is_causal", True) if is_causal is None else is_causal):
        return Asked(masking_utils.bidirectional_mask_function)
    if mask is None and window is not None:
        return Asked(masking_utils.sliding_window_causal_mask_function(window))
    return Asked(masking_utils.causal_mask_function)


def check_mask(
    layer: Any, asked: Asked, planned: Band, *, longest: int, name: str, windowed: bool = False
) -> None:
    """Raise ``ValueError`` unless the planned mask gives a layer what it asks for.

    Args:
        layer: the module, for its name.
        planned, name: the plan's mask.
        longest: tokens of the longest sequence.
        windowed: the layer has a window, whether or not sequences are longer.
    """
    who = type(layer).__name__
    if asked.fault:
        raise ValueError(
            f"{who} asks for what dcp attention cannot compare with a plan: {asked.fault}; plan "
            "it, and give dcp_any_mask=True"
        )
    if longest < 2:
        return
    wanted = asked.band(longest)
    if wanted is None:
        raise ValueError(
            f"{who} asks for a mask that is neither causal, bidirectional nor a window (such as "
            "chunks or a prefix): plan it, and give dcp_any_mask=True"
        )
    if planned == wanted:
        return
    narrowed = planned.lo >= wanted.lo and planned.hi <= wanted.hi
    on_purpose = not planned.whole or (wanted.lo <= 1 - longest and not windowed)
    if narrowed and on_purpose and (planned.hi > 0) == (wanted.hi > 0):
        return
    what, shown = wanted.named(longest), planned.named(longest)
    if wanted.hi == 0 and wanted.lo > 1 - longest:
        remedy = "plan that window and name its mask with dcp_sliding_mask"
    elif planned.hi > 0:
        remedy = "plan a causal mask, or give dcp_any_mask=True if the plan's is meant"
    else:
        remedy = f"plan a mask of {what}"
    raise ValueError(f"{who} asks for {what}, the plan's mask {name!r} holds {shown}: {remedy}")
