"""Ranks on this machine: what they return, which failure is named, and that none stays behind."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dcp.launch.failures import JobFailed
from dcp.launch.ranks import run_ranks

LAUNCHER = """
import sys
import tempfile
from dcp.launch.ranks import run_ranks
run_ranks("tests.works:leave_pids_and_wait", {"folder": sys.argv[1]}, num_processes=2)
"""


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_results_come_rank_by_rank_and_nodes_are_as_asked(tmp_path, capfd):
    found = run_ranks(
        "tests.works:add_up", {"base": 10}, num_processes=4, ranks_per_node=2, logs=tmp_path
    )
    assert [each["total"] for each in found] == [46] * 4
    assert [each["told"] for each in found] == [[0, 2, 4], [1, 2, 4], [0, 2, 4], [1, 2, 4]]
    out, err = capfd.readouterr()
    assert (out, err) == ("rank 0 says hello\n", "")
    assert (tmp_path / "rank-3.log").read_text() == "rank 3 says hello\n"
    assert not (tmp_path / "failure.log").exists()


def test_without_logs_only_the_first_rank_prints(capfd):
    run_ranks("tests.works:add_up", {"base": 0}, num_processes=2)
    assert capfd.readouterr() == ("rank 0 says hello\n", "")


def test_the_earliest_failure_is_named_and_no_later_signal(tmp_path, capfd):
    job = {"begin": time.time() + 15}
    with pytest.raises(
        JobFailed, match=r"^rank 3 failed: MemoryError: no room for 12 GiB"
    ) as found:
        run_ranks("tests.works:out_of_memory_first", job, num_processes=4, logs=tmp_path)
    assert str(tmp_path / "failure.log") in str(found.value)
    assert "in out_of_memory_first" in (tmp_path / "failure.log").read_text()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("killed", "rank 1 was killed by SIGKILL, maybe for want of memory"),
        ("mistake", "rank 1 failed: no such thing"),
        ("fault", "rank 1 failed: KeyError: 'no such\\n thing' (traceback in "),
    ],
)
def test_one_line_names_the_rank_that_failed_inside_a_group(capfd, how, line):
    with pytest.raises(JobFailed) as found:
        run_ranks("tests.works:fall_out_of_the_group", {"how": how}, num_processes=3)
    said, _, log = str(found.value).partition("/")
    assert said == line
    assert "Traceback" not in "".join(capfd.readouterr())
    if how == "fault":  # no folder for logs: it has a file of its own, which stays
        assert "KeyError" in Path(f"/{log.removesuffix(')')}").read_text()


def test_an_early_end_is_seen_while_the_first_rank_goes_on():
    started = time.monotonic()
    with pytest.raises(JobFailed, match=r"^rank 2 ended with status 3$"):
        run_ranks("tests.works:wait_beside_a_failure", {}, num_processes=3)
    assert time.monotonic() - started < 45  # the others would have taken a minute


def test_a_job_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(JobFailed, match=r"failed: it took longer than 0.5 s$"):
        run_ranks(
            "tests.works:leave_pids_and_wait",
            {"folder": str(tmp_path)},
            num_processes=1,
            timeout_seconds=0.5,
        )


def test_what_is_no_json_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(JobFailed, match=r"^rank 0 failed: TypeError: .*not JSON serializable"):
        run_ranks("tests.works:cannot_return", {}, num_processes=1)
    [log] = tmp_path.iterdir()
    assert "Traceback" in log.read_text()


def test_ranks_enter_their_node_first():
    def enter(rank):
        return ["env", f"NODE=n{rank}"]

    found = run_ranks("tests.works:say_where", {}, num_processes=2, enter=enter)
    assert [node for node, _ in found] == ["n0", "n1"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_ranks_end_with_their_launcher(tmp_path, sent):
    job = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(tmp_path)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while len(pids := [path.read_text() for path in tmp_path.iterdir()]) < 2 or "" in pids:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(sent)
    ended = time.monotonic()
    _, shown = job.communicate(timeout=30)
    assert job.returncode == -sent
    assert (b"KeyboardInterrupt" in shown) == (sent == signal.SIGINT)
    while any(map(is_alive, pids)):
        assert time.monotonic() - ended < 20
        time.sleep(0.05)


def test_more_than_the_machine_can_start_is_refused(monkeypatch, tmp_path):
    for count, match in ((0, "1 or more, got 0"), (100_000, "100000 is more than this machine")):
        with pytest.raises(ValueError, match=f"--num-processes.*{match}"):
            run_ranks("tests.works:say_where", {}, num_processes=count)

    started = []

    class Few(subprocess.Popen):
        def __init__(self, *args, **options):
            if len(started) == 1:
                raise BlockingIOError(11, "no more processes")
            super().__init__(*args, **options)
            started.append(self)

    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
    monkeypatch.setattr(f"{handler}.Popen", Few)
    with pytest.raises(ValueError, match=r"--num-processes 2: only some .* no more processes"):
        run_ranks("tests.works:leave_pids_and_wait", {"folder": str(tmp_path)}, num_processes=2)
    assert started[0].wait(timeout=30) == 1  # without a launcher that waits for it


def test_signals_and_loggers_are_left_as_they_were():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run_ranks("tests.works:say_where", {}, num_processes=1)[0][0] is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    logger = logging.getLogger("torch.distributed.elastic")
    assert logger.propagate
    assert not any(isinstance(each, logging.NullHandler) for each in logger.handlers)
    assert "TORCHELASTIC_ERROR_FILE" not in os.environ
