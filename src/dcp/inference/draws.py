"""What is drawn in a step, as the table that all ranks sum up: each row is one rank's to fill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dcp.errors import DCPError
from dcp.inference.conversations import Name
from dcp.inference.inputs import Drawn, Sampling


@dataclass(frozen=True)
class Part:
    """What one conversation does in a step: its next pending tokens enter the cache.

    Args:
        shift: the rank that a lone token goes to, modulo their number, see
            :func:`dcp.inference.plan_turn`.
        sampling: how the token behind them is drawn; None: no token is.
        num_likeliest: log-probabilities of the drawn token and of so many of the likeliest are
            told, at most as many as the model has tokens; None: none is.
    """

    name: Name
    num_tokens: int
    _: KW_ONLY
    shift: int
    sampling: Sampling | None = None
    num_likeliest: int | None = None


class Draws:
    """A row of each part: its token and log-probabilities; behind them, which ranks failed.

    Whole numbers below 2**53 pass a sum in float64 unchanged.
    """

    def __init__(
        self, parts: Sequence[Part], *, num_ranks: int, device: torch.device | str
    ) -> None:
        self._parts = parts
        self._most = max((part.num_likeliest or 0 for part in parts), default=0)
        self._width = 2 + 2 * self._most
        size = len(parts) * self._width + num_ranks
        self.table = torch.zeros(size, dtype=torch.float64, device=device)
        self._rows = self.table[: len(parts) * self._width].view(len(parts), self._width)
        self._failed = self.table[len(parts) * self._width :]

    def draw(self, index: int, logits: Tensor, position: int) -> None:
        """Fill the row of a part, if a token of it is wanted."""
        part, row = self._parts[index], self._rows[index]
        if part.sampling is None:
            return
        token = part.sampling.draw(logits, position)
        row[0] = token
        if part.num_likeliest is not None:
            logprobs = logits.double().log_softmax(0)
            row[1] = logprobs[token]
            best, count = logprobs.topk(part.num_likeliest), part.num_likeliest
            row[2 : 2 + count] = best.indices
            row[2 + self._most : 2 + self._most + count] = best.values

    def fail(self, rank: int) -> None:
        """Say that this rank failed."""
        self._failed[rank] = 1

    def be_silent(self) -> None:
        """Another rank says what was drawn."""
        self._rows.zero_()

    def failed_ranks(self) -> list[int]:
        """Ranks that failed, once all have been summed up."""
        return self._failed.nonzero().flatten().tolist()

    def found(self) -> list[Drawn | None]:
        """What was drawn for each part, once all ranks have been summed up."""
        rows = self._rows.tolist()
        return [self._read(part, row) for part, row in zip(self._parts, rows, strict=True)]

    def _read(self, part: Part, row: list[float]) -> Drawn | None:
        if part.sampling is None:
            return None
        if part.num_likeliest is None:
            return Drawn(int(row[0]))
        ids, values = row[2 : 2 + self._most], row[2 + self._most :]
        likeliest = zip(map(int, ids), values, strict=True)
        return Drawn(int(row[0]), row[1], tuple(likeliest)[: part.num_likeliest])


class Meeting:
    """Where the ranks tell each other what they drew.

    Args:
        groups: by meeting in one after the other, all ranks meet: that of attention, and that of
            tensor parallelism.
        speaks: ranks that share weights draw the same, and one of them says it.

    Attributes:
        lost: why they can no longer meet; None while they can.
    """

    def __init__(self, groups: Sequence[dist.ProcessGroup], *, speaks: bool = True) -> None:
        self._groups, self._speaks = list(groups), speaks
        self.lost: str | None = None

    def wait(self) -> None:
        """Until all ranks are here."""
        for group in self._groups:
            dist.barrier(group=group)

    def finish(self, draws: Draws, failed: Exception | None) -> list[Drawn | None]:
        """What all ranks drew; raises on each where ``failed`` says that one of them did."""
        if not self._speaks:
            draws.be_silent()
        if self._groups:
            self._sum(draws.table, failed)
        if failed is not None:
            raise failed
        if ranks := draws.failed_ranks():
            raise DCPError(f"rank {ranks[0]} failed in this turn, of which nothing is kept")
        return draws.found()

    def _sum(self, table: Tensor, failed: Exception | None) -> None:
        """Sum over the ranks. Where that fails, the group is of no more use."""
        alone = failed is not None and not isinstance(failed, ValueError | DCPError)
        if alone and len(self._groups) > 1:  # those that share its weights wait inside a layer
            self.lost = self.lost or f"{type(failed).__name__}: {failed}"
        if self.lost is None:
            try:
                for group in self._groups:
                    dist.all_reduce(table, group=group)
                return
            except RuntimeError as error:
                self.lost = str(error).strip().splitlines()[0]
        raise failed or DCPError(f"the ranks have lost each other: {self.lost}")
