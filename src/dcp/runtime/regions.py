"""Which plan a call means, in its forward pass and when backward repeats it.

Activation checkpointing calls a region of a model again during backward, when another plan may have
been prepared. What a region's forward pass and its repetition share is the object that autograd
keeps for it, which is in reach of both through the Python stack:

- `torch.utils.checkpoint` without reentrance has a frame object per region. A variable of
  ``checkpoint``'s generator holds it in forward, and the hook that recomputes in backward.
- reentrant checkpointing (torch's, Megatron's, DeepSpeed's) and compiled functions are an
  ``autograd.Function``, whose ``ctx`` is the first argument of its ``forward`` and ``backward``.

A region that is not found costs a refusal, never a wrong plan: see
:meth:`dcp.AttentionExecutor.bind`.
"""

from __future__ import annotations

import inspect
import sys
from collections import deque
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.utils.checkpoint
from torch.autograd.function import FunctionCtx

from dcp.runtime.prepared import PreparedPlan

# Plans that an executor keeps for backward passes of compiled code, which cannot hold their plan.
KEPT_PLANS = 64
_CHECKPOINT = inspect.unwrap(torch.utils.checkpoint.checkpoint).__code__


class Plans:
    """An executor's plans: the one in use, and those that a backward pass may come back to."""

    def __init__(self) -> None:
        self.last_used: PreparedPlan | None = None
        self._by_number: WeakValueDictionary[int, PreparedPlan] = WeakValueDictionary()
        self._kept: deque[PreparedPlan] = deque(maxlen=KEPT_PLANS)
        self._was_another = False  # whether any other was in use before
        # regions of forward passes and the plan of their calls, None where they had several
        self._regions: WeakKeyDictionary[Any, PreparedPlan | None] = WeakKeyDictionary()

    def add(self, plan: PreparedPlan) -> None:
        """Make it known by its number."""
        self._by_number[plan.number] = plan
        self._kept.append(plan)

    def use(self, plan: PreparedPlan) -> None:
        """In calls from now on."""
        self._was_another |= self.last_used is not None and self.last_used is not plan
        self.last_used = plan

    def numbered(self, number: int) -> PreparedPlan:
        """The plan with ``number``; ``ValueError`` if it is gone."""
        if number not in self._by_number:
            raise ValueError(
                f"plan {number} is gone before its backward pass: compiled code may be at most "
                f"{KEPT_PLANS} plans behind, unless what executor.bind(plan) returned is kept"
            )
        return self._by_number[number]

    def in_use(self) -> PreparedPlan:
        """The plan that the call under way means.

        Raises ``ValueError`` where none is in use, and in a backward pass where it cannot be told
        which of several is meant.
        """
        plan, around = self.last_used, _regions()
        if plan is None:
            raise ValueError("the executor has no plan yet: call executor.prepare(plan) first")
        if torch._C._current_graph_task_id() != -1:  # a backward pass runs in this thread
            known = [self._regions[region] for region in around if region in self._regions]
            plan = known[0] if known else None if self._was_another else plan
            if plan is None:
                raise ValueError(
                    "attention is called during a backward pass, and it cannot be told which of "
                    "the executor's plans is meant: give the model executor.bind(plan) instead of "
                    "the executor"
                )
        for region in around:
            if self._regions.setdefault(region, plan) is not plan:
                self._regions[region] = None
        return plan


def _regions() -> list[Any]:
    """The regions around this call, innermost first."""
    found: list[Any] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.append(_region(frame))
        frame = frame.f_back
    return [region for region in found if region is not None]


def _region(frame: FrameType) -> Any | None:
    """What stands for a region in one frame of the stack."""
    code = frame.f_code  # asked first, because a frame's variables are costly to read
    if code is _CHECKPOINT:
        generator = getattr(frame.f_locals.get("gen"), "gi_frame", None)
        return generator and generator.f_locals.get("new_frame")
    if code.co_filename == _CHECKPOINT.co_filename and "frame" in code.co_freevars:
        return frame.f_locals.get("frame")
    if code.co_varnames[:1] == ("ctx",):
        ctx = frame.f_locals.get("ctx")
        return ctx if isinstance(ctx, FunctionCtx) else None
    return None
