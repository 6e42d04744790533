"""The soak's own parts; the soak itself takes minutes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from dcp.data import PlanningPool
from lab import soak
from lab.__main__ import main

PARENT = """
import sys, time
from dcp.data import PlanningPool
pool = PlanningPool(2)
print(*pool.worker_pids, flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_the_workers_of_a_job_are_found_and_killed_and_nobody_elses():
    other = PlanningPool(1)
    job = subprocess.Popen([sys.executable, "-c", PARENT, "2"], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in job.stdout.readline().split()]
    assert sorted(soak.planning_workers(job.pid)) == sorted(pids)
    assert set(soak.planning_workers(os.getpid())) == {*pids, *other.worker_pids}
    killed = soak.disturb(job, 0.3, random.Random(0))
    assert sorted(killed) == sorted(pids)  # nobody replaced them: nobody asked for a plan
    assert job.wait() == 0
    assert soak.planning_workers(os.getpid()) == other.worker_pids
    other.close()
    job.stdout.close()


def test_sigterm_ends_the_soak_and_its_job():
    command = [sys.executable, "-m", "dcp.cli", "bench", "soak", "--steps=100000"]
    job = subprocess.Popen(command)
    deadline = time.monotonic() + 80

    def ranks():
        return [pid for pid in started if "dcp.jobs" in soak._command(pid)]

    started = soak.family(job.pid)
    while len(ranks()) < 2:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
        started = soak.family(job.pid)
    job.terminate()
    try:
        assert job.wait(timeout=20) == 128 + signal.SIGTERM
        while left := [pid for pid in started if any(soak._command(pid))]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
    finally:
        for pid in started:
            if any(soak._command(pid)):
                os.kill(pid, signal.SIGKILL)


def test_the_summary_leaves_the_start_out():
    def step(seconds, waited, depth):
        return {"loss": 1.5, "seconds": seconds, "plan_wait_seconds": waited,
                "planning_seconds": 0.25, "planned_ahead": depth}  # fmt: skip

    figures = soak.summarise([step(9, 8, 0)] * 10 + [step(1, 0.0, 4), step(3, 0.2, 2)])
    assert figures["losses"] == [1.5] * 12
    assert figures["wait_share"] == pytest.approx(0.05)
    assert figures["median_wait_share"] == pytest.approx(0.2 / 3 / 2)
    assert figures["longest_wait_seconds"] == 0.2
    assert (figures["least_planned_ahead"], figures["median_planned_ahead"]) == (2, 3)


def test_mistakes_get_one_line(capsys):
    assert main(["soak", "--num-processes=1"]) == 2
    assert "the soak needs 2 ranks, more than 10 steps" in capsys.readouterr().err
