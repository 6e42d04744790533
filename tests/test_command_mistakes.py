"""Commands end with a line and a status, and leave nothing behind, however they are ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcp.cli import main
from dcp.launch.command import CommandParser, run_command

DCP = [sys.executable, "-m", "dcp.cli"]
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}  # fmt: skip
BATCHES = Path(__file__).parents[1] / "lab" / "data" / "planner_batches.json"


def ended_by(error, capsys):
    """Status and line of a command that raises."""

    def build():
        parser = CommandParser(prog="dcp")
        words = parser.add_subparsers(dest="command").add_parser("do")
        words.set_defaults(run=lambda _: (_ for _ in ()).throw(error))
        return parser

    status = run_command("dcp", build, ["do"])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("one\ntwo"), 2, "dcp do: one two\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "dcp do: [Errno 2] No such file: 'x'\n"),
        (MemoryError(), 1, "dcp do: MemoryError: MemoryError: more than this machine can hold\n"),
        (OverflowError("big"), 1, "dcp do: OverflowError: big: more than this machine can hold\n"),
        (RecursionError("deep"), 1, "dcp do: RecursionError: deep: more than this"),
        (KeyboardInterrupt(), 130, "dcp do: interrupted\n"),
        (ValueError("x" * 10**6), 2, "dcp do: xxx"),
    ],
)
def test_errors_are_one_line(capsys, error, status, said):
    found, err = ended_by(error, capsys)
    assert found == status
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert len(err) < 1100


def test_a_defect_is_one_line_that_names_a_file_that_stays(capsys):
    status, err = ended_by(KeyError("odd"), capsys)
    assert status == 1
    assert err.startswith("dcp do: KeyError: 'odd' (a defect of dcp, please report it with ")
    log = Path(err.split()[-1].rstrip(")"))
    assert "Traceback" in log.read_text()
    log.unlink()


def test_an_interrupt_while_a_command_is_imported_is_one_line(capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dcp.cli.import_module", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "dcp doctor: interrupted\n"


def test_a_reader_that_has_seen_enough_hears_nothing():
    words = [*DCP, "plan", "--batches", str(BATCHES), "--strategy", "zigzag", "--json"]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert job.stdout.readline().startswith("{")
    job.stdout.close()
    assert job.wait(60) == 1
    assert job.stderr.read() == ""
    job.stderr.close()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MASTER_PORT", "x"), ("MASTER_PORT", "99999"), ("LOCAL_RANK", "y"), ("LOCAL_RANK", "1"),
     ("LOCAL_WORLD_SIZE", "-2"), ("WORLD_SIZE", "0"), ("RANK", "7"), ("RANK", "1.0"),
     ("MASTER_ADDR", "")],
)  # fmt: skip
@pytest.mark.parametrize("command", [["train"], ["generate", "--prompt", "x"]])
def test_a_launcher_that_is_none_is_named(capsys, monkeypatch, command, variable, value):
    for name, usual in (RANK | {variable: value}).items():
        monkeypatch.setenv(name, usual)
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{variable}" in err
    assert value in err


def test_a_port_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = os.environ | RANK | {"MASTER_PORT": str(taken.getsockname()[1])}
        words = [*DCP, "generate", "--prompt", "x"]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]  # torch's own log may stand before it
    assert line.startswith("dcp generate: The server socket has failed to listen")
    assert "Traceback" not in done.stderr


JOBS = {
    "train": ["train", "--num-processes=2", "--max-steps=100000", "--disable-tqdm=true",
              "--tokens-per-batch=600", "--max-seqlen=300", "--config-overrides=hidden_size=32"],
    "generate": ["generate", "--num-processes=2", "--prompt=Hello", "--max-new-tokens=8000"],
}  # fmt: skip


def left_in(folder):
    """What is there, but for torch's cache of compiled code, which it keeps for the next run."""
    return [path for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


@pytest.mark.parametrize(
    ("name", "number"), [("train", signal.SIGKILL), ("generate", signal.SIGTERM)]
)
def test_nothing_is_left_in_the_temporary_folder(tmp_path, name, number):
    temporary, metrics = tmp_path / "temporary", tmp_path / "run" / "metrics.jsonl"
    temporary.mkdir()
    words = [*DCP, *JOBS[name]]
    if name == "train":
        words.append(f"--output={tmp_path / 'run'}")
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, env=environment, text=True) as job:
        while job.poll() is None and not left_in(temporary):
            time.sleep(0.05)
        while job.poll() is None and name == "train" and not metrics.exists():
            time.sleep(0.05)
        time.sleep(1.5)  # in the middle of it
        assert job.poll() is None
        job.send_signal(number)
        assert job.wait(30) == (143 if number == signal.SIGTERM else -9)
        deadline = time.monotonic() + 15
        while left_in(temporary) and time.monotonic() < deadline:  # ranks do what it could not
            time.sleep(0.1)
        assert left_in(temporary) == []
        said = job.stderr.read()
    assert "Traceback" not in said, said
    assert "BrokenPipe" not in said
