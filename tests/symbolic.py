"""Runs a plan's programs on labels instead of numbers, and complains about whatever is wrong.

Every buffer row holds the (token, head group) it stands for. Ranks take turns at random, one
instruction at a time; rows under a transfer are marked until it is waited for. The result is how
often each unmasked pair was computed.
"""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np

from dcp.program import Attention, Copy, Launch, RankPlan, Reduce, Wait
from dcp.tables import Move
from dcp.transfers import DKV, KV, OUT, Q

EMPTY = -1


class SymbolicRank:
    """One rank: a label for every row of every buffer."""

    def __init__(
        self, plan: RankPlan, keys: np.ndarray, mask: str, backward: bool, world: SymbolicWorld
    ) -> None:
        self.plan, self.world, self.rank, self.keys = plan, world, plan.rank, keys
        self.program = plan.mask_program(mask)
        self.todo = self.program.instructions(backward=backward)[::-1]
        groups = plan.num_head_groups
        self.groups = {Q: groups, OUT: groups}
        self.groups |= {KV: min(groups, plan.spec.num_kv_heads)}
        self.groups[DKV] = self.groups[KV]
        self.labels = [np.full(n, EMPTY, dtype=np.int64) for n in self.program.buffer_rows]
        self.sending = [np.zeros(n, dtype=int) for n in self.program.buffer_rows]
        self.receiving = [np.zeros(n, dtype=int) for n in self.program.buffer_rows]
        self.in_flight: dict[int, Launch] = {}
        self.touched = {OUT: set(), DKV: set()}
        self.results = {OUT: [], DKV: []}

    def own_labels(self, buffer: int) -> np.ndarray:
        indices = self.keys if buffer in (KV, DKV) else self.plan.token_indices
        groups = np.arange(self.groups[buffer])[:, None]
        return (groups * self.world.size(buffer) + indices[None, :]).reshape(-1)

    def can_go(self) -> bool:
        if not self.todo or not isinstance(self.todo[-1], Wait):
            return bool(self.todo)
        launch = self.in_flight[self.todo[-1].step]
        peers = set(launch.receives[:, Move.PEER].tolist())
        return all(self.world.boxes[peer, self.rank] for peer in peers)

    def go(self) -> None:
        instruction = self.todo.pop()
        match instruction:
            case Copy(direction="load"):
                for buffer in range(4):
                    own = self.own_labels(buffer)
                    self.labels[buffer][: len(own)] = own
            case Copy():
                assert not self.in_flight, "a transfer is never waited for"
            case Launch():
                self.launch(instruction)
            case Wait():
                self.wait(instruction)
            case Attention():
                self.attend(instruction)
            case Reduce():
                self.reduce(instruction)

    def launch(self, launch: Launch) -> None:
        outgoing = defaultdict(list)
        for peer, buffer, row, rows in launch.sends.tolist():
            part = slice(row, row + rows)
            assert not self.receiving[buffer][part].any(), "sends rows that are still arriving"
            labels = self.labels[buffer][part].copy()
            assert (labels != EMPTY).all(), "sends rows that hold nothing"
            self.sending[buffer][part] += 1
            outgoing[peer].append((buffer, labels))
        for peer, message in outgoing.items():
            self.world.boxes[self.rank, peer].append(message)
        for _, buffer, row, rows in launch.receives.tolist():
            part = slice(row, row + rows)
            busy = self.receiving[buffer][part] + self.sending[buffer][part]
            assert not busy.any(), "receives into rows of another transfer"
            self.receiving[buffer][part] = 1
            self.labels[buffer][part] = EMPTY
        self.in_flight[launch.step] = launch

    def wait(self, wait: Wait) -> None:
        launch = self.in_flight.pop(wait.step)
        by_peer = defaultdict(list)
        for peer, *move in launch.receives.tolist():
            by_peer[peer].append(move)
        for peer, moves in by_peer.items():
            message = self.world.boxes[peer, self.rank].pop(0)
            assert len(message) == len(moves), "sender and receiver disagree on a message"
            for (sent_buffer, labels), (buffer, row, rows) in zip(message, moves, strict=True):
                assert (sent_buffer, len(labels)) == (buffer, rows)
                self.labels[buffer][row : row + rows] = labels
                self.receiving[buffer][row : row + rows] = 0
        for _, buffer, row, rows in launch.sends.tolist():
            self.sending[buffer][row : row + rows] -= 1

    def attend(self, attention: Attention) -> None:
        for buffer, row, rows in attention.resets.tolist():
            part = slice(row, row + rows)
            assert not (self.sending[buffer][part] + self.receiving[buffer][part]).any()
            self.labels[buffer][part] = EMPTY
        own = {buffer: len(self.own_labels(buffer)) for buffer in range(4)}
        tokens, keys = self.world.size(Q), self.world.size(KV)
        for item in attention.items.tolist():
            q_row, kv_row, out_row, dkv_row, q_rows, kv_rows, group, start, stop = item
            q, kv = self.read(Q, q_row, q_rows), self.read(KV, kv_row, kv_rows)
            assert (q // tokens == group).all(), "queries of another head group"
            kv_group = group * self.groups[KV] // self.groups[Q]
            assert (kv // keys == kv_group).all(), "keys of another head group"
            self.accumulate(OUT, out_row, q, own[OUT])
            if self.world.backward:
                self.accumulate(DKV, dkv_row, kv, own[DKV])
            for q0, q1, k0, k1, lo, hi in self.program.slices[start:stop].tolist():
                diagonal = np.arange(k0, k1)[None, :] - np.arange(q0, q1)[:, None]
                seen = (diagonal >= lo) & (diagonal <= hi)
                pairs = np.ix_([group], q[q0:q1] % tokens, kv[k0:k1] % keys)
                self.world.count[pairs] += seen[None]

    def read(self, buffer: int, row: int, rows: int) -> np.ndarray:
        part = slice(row, row + rows)
        assert not self.receiving[buffer][part].any(), "reads rows that are still arriving"
        labels = self.labels[buffer][part]
        assert (labels != EMPTY).all(), "reads rows that hold nothing"
        return labels

    def accumulate(self, buffer: int, row: int, labels: np.ndarray, own_rows: int) -> None:
        part = slice(row, row + len(labels))
        assert not (self.sending[buffer][part] + self.receiving[buffer][part]).any()
        held = self.labels[buffer][part]
        if row >= own_rows and (held == EMPTY).all():
            self.labels[buffer][part] = labels  # the first touch after a reset
        assert (self.labels[buffer][part] == labels).all(), "adds to another token's result"

    def reduce(self, reduce: Reduce) -> None:
        for buffer, source, target, rows in reduce.rows.tolist():
            arrived = self.read(buffer, source, rows)
            assert (arrived == self.read(buffer, target, rows)).all(), "sums different tokens"
            self.world.reduced += rows


class SymbolicWorld:
    """All ranks of a plan, run in a random order of instructions."""

    def __init__(self, plan, mask: str, *, backward: bool, seed: int) -> None:
        self.backward, self.reduced = backward, 0
        self.boxes: dict[tuple[int, int], list] = defaultdict(list)
        self.plan = plan
        self.count = np.zeros((plan.num_head_groups, plan.num_tokens, plan.num_keys), dtype=int)
        # plans travel as bytes: what is checked is what arrives
        plans = [RankPlan.from_bytes(plan.rank_plan(r).to_bytes()) for r in range(plan.num_ranks)]
        self.ranks = [
            SymbolicRank(rank_plan, plan.key_indices(rank), mask, backward, self)
            for rank, rank_plan in enumerate(plans)
        ]
        self.random = random.Random(seed)

    def size(self, buffer: int) -> int:
        """Different tokens that the rows of a buffer may be of."""
        return self.plan.num_keys if buffer in (KV, DKV) else self.plan.num_tokens

    def run(self) -> np.ndarray:
        """How often each (head group, query, key) was computed."""
        while any(rank.todo for rank in self.ranks):
            able = [rank for rank in self.ranks if rank.can_go()]
            assert able, "deadlock"
            self.random.choice(able).go()
        assert not any(self.boxes.values()), "a message that nobody receives"
        return self.count


def check_plan(plan, mask: str, wanted: np.ndarray, *, seed: int = 0) -> None:
    """Every pair of ``wanted`` exactly once in both passes, and no rule of the runtime broken."""
    for backward in (False, True):
        count = SymbolicWorld(plan, mask, backward=backward, seed=seed).run()
        assert (count == wanted[None].astype(int)).all(), "a pair is missing or computed twice"
