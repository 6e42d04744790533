"""Splitting a model's tokens over a group from outside, by hooks on its modules.

A plan says, by the path of a module, which of its inputs (by name) or outputs (by number) are split
along which dimension, or along which its output is gathered. It is the plan that diffusers' models
declare as ``_cp_plan``; any object with ``split_dim``, ``expected_dims`` and ``split_output``, or
with ``gather_dim``, will do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dcp.datacentric.sequence_group import SequenceGroup
from dcp.datacentric.workload import TooFewTokens

Plan = Mapping[str, Any]
MAIN, OTHER = "hidden_states", "encoder_hidden_states"  # a model's sequences, by diffusers' names


class SharedTokens:
    """How the tokens of one micro-batch are shared out: found out as its inputs are split.

    Attributes:
        totals: tokens of each sequence over all ranks, by its name.
        order: of the sequences in attention over both, where it is known.
        num_exchanges: how often attention was over the tokens of all ranks.
    """

    def __init__(self, group: SequenceGroup, order: Sequence[str] | None = None) -> None:
        self.group, self.order = group, order
        self.totals: dict[str, int] = {}
        self.num_exchanges = 0

    def split(self, x: Tensor, dim: int, name: str | int) -> Tensor:
        """This rank's part of an input."""
        total = x.shape[dim]
        if total < self.group.size:
            raise TooFewTokens(f"{name}: {total} tokens cannot be split over {self.group.size}")
        if name in (MAIN, OTHER):
            known = self.totals.setdefault(str(name), total)
            if known != total:
                raise ValueError(f"{name} has {total} tokens here, {known} in another module")
        part = self.group.part(total)
        return x.narrow(dim, part.start, part.stop - part.start)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts of an output."""
        return self.group.gather(x, dim=dim, total=self.runs(x.shape[dim], crossed=False))

    def runs(self, size: int, *, crossed: bool) -> tuple[int, ...]:
        """Totals of the sequences that ``size`` tokens of this rank are parts of.

        Those of the main sequence, of the other one (``crossed``), or of both, one after the other.
        Raises ``ValueError`` for any other number of tokens.
        """
        names = [name for name in self.order or self.totals if name in self.totals]
        one = OTHER if crossed else MAIN
        for among in (names, [one] if one in names else []):
            runs = tuple(self.totals[name] for name in among)
            if runs and size == sum(map(self._part, runs)):
                return runs
        raise ValueError(
            f"{size} tokens are no part of what the plan splits, {self.totals}: this model does "
            "more with its tokens than the plan says; write a split() of its own"
        )

    def _part(self, total: int) -> int:
        part = self.group.part(total)
        return part.stop - part.start


def split_tokens(model: nn.Module, plan: Plan, shared: SharedTokens) -> list[RemovableHandle]:
    """Hooks that do what a plan says.

    Raises ``ValueError`` for a path that the model has not got.
    """
    handles = []
    for path, what in plan.items():
        for module in _modules_at(model, path):
            if isinstance(what, Mapping):
                handles += _split_hooks(module, what, shared)
            else:
                hook = _gather_hook(what if isinstance(what, list | tuple) else [what], shared)
                handles.append(module.register_forward_hook(hook))
    return handles


def bound(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call's arguments by their names, the module itself first."""
    kind: Any = type(module)
    return _signature(kind).bind(module, *args, **kwargs)


@cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _modules_at(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules of a path, in which ``*`` is each layer of a list; of a layer that a shorter
    model has not got, none."""
    first, _, rest = path.partition(".")
    child: Any
    if not path:
        yield model
    elif first == "*":
        for child in model.children():
            yield from _modules_at(child, rest)
    elif isinstance(child := getattr(model, first, None), nn.Module):
        yield from _modules_at(child, rest)
    elif not first.isdigit():
        raise ValueError(f"the plan names {first!r}, which {type(model).__name__} has not got")


def _split_hooks(
    module: nn.Module, what: Mapping[Any, Any], shared: SharedTokens
) -> list[RemovableHandle]:
    inputs = {name: how for name, how in what.items() if isinstance(name, str)}
    outputs = {number: how for number, how in what.items() if isinstance(number, int)}

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        call = bound(module, args, kwargs)
        for name, how in inputs.items():
            if call.arguments.get(name) is not None:
                call.arguments[name] = _split(call.arguments[name], how, name, shared)
        return call.args[1:], call.kwargs

    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        parts = [output] if isinstance(output, Tensor) else list(output)
        for number, how in outputs.items():
            parts[number] = _split(parts[number], how, number, shared)
        return parts[0] if isinstance(output, Tensor) else type(output)(parts)

    handles = []
    if inputs:  # first of all, so that other hooks see what the module sees
        hook: Callable[..., Any] = before
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    if outputs:
        handles.append(module.register_forward_hook(after))
    return handles


def _split(x: Any, how: Any, name: str | int, shared: SharedTokens) -> Any:
    if isinstance(how, list | tuple):
        return type(x)(_split(x, how, name, shared) for x, how in zip(x, how, strict=True))
    if how.expected_dims is not None and x.dim() != how.expected_dims:
        return x  # as a time of each sample, where the plan splits one of each token
    return shared.split(x, how.split_dim, name)


def _gather_hook(what: Sequence[Any], shared: SharedTokens) -> Callable[..., Any]:
    def after(module: nn.Module, args: tuple, output: Any) -> Any:
        parts = [output] if isinstance(output, Tensor) else list(output)
        parts = [
            part if how is None else shared.gather(part, how.gather_dim)
            for part, how in zip(parts, what, strict=True)
        ]
        return parts[0] if isinstance(output, Tensor) else type(output)(parts)

    return after
