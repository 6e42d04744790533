"""Long-lived gloo processes, one set per world size, so that each test costs no start-up."""

from __future__ import annotations

import io
import multiprocessing
import runpy
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

TIMEOUT_SECONDS = 150  # of a rank's answer, on a busy machine too


class GlooPool:
    """``world`` processes joined in a gloo group; :meth:`run` calls a function on all of them."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``[function(*args) on rank 0, on rank 1, …]``; a failing rank fails the call.

        Every rank's answer is taken before any failure is raised, so that none is left for the next
        call. A rank that does not answer ends the pool, see :attr:`is_alive`.
        """
        for pipe in self.pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + TIMEOUT_SECONDS
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(deadline - time.monotonic(), 0)):
                self.close()
                raise TimeoutError(f"rank {rank} of {len(self.pipes)} did not answer")
            answers.append(pipe.recv())
        for rank, (failure, _) in enumerate(answers):
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
        return [result for _, result in answers]

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))


def run_script(path: str, words: list[str]) -> str:
    """What a script prints on a rank of this group, as if it had made the group itself."""
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        mock.patch.multiple(
            dist, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT
        ),
        mock.patch("sys.argv", [path, *words]),
        mock.patch("sys.path", [str(Path(path).parent), *sys.path]),
    ):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()
