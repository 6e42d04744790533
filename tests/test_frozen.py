"""A process that stands still: stopped, hung, or on a machine that was unplugged."""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings

import pytest

from dcp import Cluster, SequenceBatch
from dcp.data import PlanningPool, PoolLost
from dcp.data.messages import request_to_bytes
from dcp.data.pool import FIRST_SECONDS, LEAST_SECONDS, open_pool
from dcp.runtime.waiting import Caller, NoAnswer
from tests.loading import SPEC, worker_pids

TIMEOUT_SECONDS = 20.0  # also for the ranks to meet, on a busy machine


def start(world, kind):
    """Ranks as torchrun on many machines starts them: rank 0 keeps the store."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(world):
        variables = common | {"RANK": rank, "OMP_NUM_THREADS": 1}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-m", "tests.frozen_work", kind, str(TIMEOUT_SECONDS)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **pipes))
    return ranks


@pytest.mark.parametrize("kind", ["reduce", "load"])
def test_nobody_waits_for_a_frozen_first_rank_for_ever(kind):
    ranks = start(3, kind)
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "running\n"
        ranks[0].send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # until the others wait for it
        began = time.monotonic()
        ranks[1].send_signal(signal.SIGINT)
        ranks[1].communicate(timeout=60)
        assert time.monotonic() - began < TIMEOUT_SECONDS  # Ctrl-C does not wait for the time-out
        assert ranks[1].returncode in (-signal.SIGINT, 128 + signal.SIGINT)
        _, shown = ranks[2].communicate(timeout=60)
        assert ranks[2].returncode == 1
        assert "rank 0, or what else keeps the job's store, died or stands still" in shown
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_a_call_that_hangs_is_given_up_and_later_ones_fail_at_once():
    caller, held = Caller(), []
    assert caller.call(60, lambda: 3) == 3
    with pytest.raises(KeyError, match="own"):
        caller.call(60, {}.__getitem__, "own")
    with pytest.raises(NoAnswer, match=r"no answer within 0\.05 s"):
        caller.call(0.05, lambda: time.sleep(1) or held.append(1))
    began = time.monotonic()
    with pytest.raises(NoAnswer):
        caller.call(60, lambda: held.append(2))
    assert time.monotonic() - began < 30
    assert 2 not in held


# --------------------------------------------------------------------------- planning workers


REQUEST = request_to_bytes(SequenceBatch([9]), SPEC, Cluster(devices_per_node=1), {})


def stop(pid):
    os.kill(pid, signal.SIGSTOP)


def test_a_hung_worker_is_replaced_and_its_batch_planned_again():
    pool = open_pool("processes", num_workers=1, worker_timeout_seconds=20.0)
    wanted = pool.submit(REQUEST).result(90)
    pool._jobs._timeout = 1.0  # now that the planner is imported
    old = worker_pids(pool)[0]
    stop(old)
    pending = pool.submit(REQUEST)
    while worker_pids(pool)[0] == old:
        time.sleep(0.02)
    pool._jobs._timeout = 60.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pending.result(90)
    assert len(found) == len(wanted) == 1
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    assert all("no plan within 1 s, pid" in str(each.message) for each in caught)


def test_a_pool_whose_workers_all_hang_is_lost():
    pool = PlanningPool(1, worker_timeout_seconds=0.001)  # before any of them is up
    with pytest.raises(
        PoolLost, match=r"3 planning workers in a row died.*no plan within 0\.001 s"
    ):
        pool.submit(REQUEST).result(90)
    with pytest.raises(PoolLost):
        pool.submit(REQUEST).result(90)


def test_patience_goes_by_the_slowest_batch():
    jobs = PlanningPool(0)._jobs
    assert [jobs.patience(deaths) for deaths in range(2)] == [FIRST_SECONDS, 2 * FIRST_SECONDS]
    jobs.took(0.5)
    assert jobs.patience(0) == LEAST_SECONDS
    jobs.took(7.0)
    jobs.took(1.0)
    assert [jobs.patience(deaths) for deaths in range(3)] == [140.0, 280.0, 560.0]
    with pytest.raises(ValueError, match="worker_timeout_seconds must be positive, or None, got 0"):
        open_pool("processes", num_workers=1, worker_timeout_seconds=0)
