"""Who is still there: when communication fails, every rank can say which rank is to blame."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch.distributed as dist

from dcp.launch.failures import RankLost
from dcp.runtime.waiting import NoAnswer, PatientStore

_VERDICT = "verdict"
INTERVAL_SECONDS = 0.5
SILENCE_SECONDS = 3.0  # so long without a beat is death: six beats

ANSWER_SECONDS = 5.0  # so long without an answer of the store is its death


class Heartbeat:
    """Beats into the job's store, from a thread, while the ``with`` block runs.

    Args:
        group: all ranks of the job.
        patience_seconds: how long the rank that keeps the store stays for the others to ask it.
    """

    def __init__(self, group: Any, *, patience_seconds: float = 2 * SILENCE_SECONDS) -> None:
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._patience = patience_seconds
        # own connections: one thread's call must not hold the other up
        self._beats, self._notes = (
            PatientStore("dcp-beats", group.get_group_store(), timeout_seconds=ANSWER_SECONDS)
            for _ in range(2)
        )
        self._ended = threading.Event()
        self._verdict = ""  # what a rank has found out, heard before the store ends with its keeper
        self._beats.set(f"beat/{self._rank}", "0")

    def __enter__(self) -> Heartbeat:
        threading.Thread(target=self._beat, name="dcp-heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def explain(self, error: Exception) -> Exception:
        """A :class:`RankLost` that names the silent ranks, else the error itself.

        Takes ``SILENCE_SECONDS``, or ``ANSWER_SECONDS`` where the store does not answer. A rank
        that fails in turn says so first, and is not blamed.
        """
        reason = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {reason[0][:300] if reason else ''}"
        try:
            self._notes.set(f"failed/{self._rank}", "")
            before = self._pulse()
            time.sleep(SILENCE_SECONDS)
            silent = [
                rank
                for rank, (one, other) in enumerate(zip(before, self._pulse(), strict=True))
                if one == other and not self._notes.check([f"failed/{rank}"])
            ]
            verdict = _blaming(silent)
            if silent:
                self._notes.set(_VERDICT, verdict)
            self._notes.set(f"left/{self._rank}", "")
            if self._rank == 0:
                self._wait_for(set(range(self._size)) - set(silent))
        except NoAnswer as silent_store:
            return RankLost(f"{self._verdict or silent_store} ({cause})")
        except RuntimeError:  # torch's kinds for a lost store
            keeper = "rank 0, or what else keeps the job's store, died"
            return RankLost(f"{self._verdict or keeper} ({cause})")
        return RankLost(f"{verdict} ({cause})") if silent else error

    def _pulse(self) -> list[bytes]:
        return self._notes.multi_get([f"beat/{rank}" for rank in range(self._size)])

    def _wait_for(self, ranks: set[int]) -> None:
        """The store ends with this rank: let the others find their own explanation."""
        try:
            self._notes.wait_for([f"left/{rank}" for rank in ranks], self._patience)
        except RuntimeError:  # they will say that this rank is gone
            return

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(INTERVAL_SECONDS):
            count += 1
            try:
                self._beats.set(f"beat/{self._rank}", str(count))
                if not self._verdict and self._beats.check([_VERDICT]):
                    self._verdict = self._beats.get(_VERDICT).decode()
            except RuntimeError:  # the store is gone: so is the job
                return


def _blaming(silent: list[int]) -> str:
    names = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
    return f"{names} died or cannot be reached, silent for {SILENCE_SECONDS:g} s"
