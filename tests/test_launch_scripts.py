"""Scripts for clusters: clean by their linters, and run against a scheduler that only listens."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("scripts/*.sh")]
SCRIPTS.append(ROOT / ".ci/run")
RUN = ["-m", "dcp.cli", "train", "a job.yaml", "--max-steps", "7"]  # a word with a space in it


def tool(name):
    """A program of this environment, or of the machine."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_have_no_warning(script):
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_has_no_warning():
    command = [tool("hadolint"), ROOT / "launch/Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_of_a_torch_that_is_supported():
    """And copies only what the package is built from."""
    words = (ROOT / "launch/Dockerfile").read_text()
    assert "pytorch/pytorch:2.11." in words
    for copied in ("pyproject.toml", "README.md", "LICENSE", "src"):
        assert copied in words
        assert (ROOT / copied).exists()


@pytest.fixture
def heard(tmp_path):
    """``heard(script, environment)``: words that each fake program was called with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    log = tmp_path / "log"
    fake = f'#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" "" >> {log}\n'
    scontrol = fake + "printf 'host7\\nhost8\\nhost9\\n'\n"
    # srun runs the rest of its line, as on one of the nodes
    srun = fake + 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n'
    for name, text in {"torchrun": fake, "srun": srun, "scontrol": scontrol}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def run(script, environment, words=RUN):
        path = f"{programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "launch" / script, *words],
            env={"PATH": path, **environment},
            capture_output=True,
            text=True,
        )
        said = log.read_text() if log.exists() else ""
        calls = [call.split("\n") for call in said.split("\n\n") if call]
        return done, {name: words for name, *words in calls}

    return run


def test_torchrun_on_every_machine(heard):
    done, calls = heard("torchrun.sh", {"NODES": "4", "NODE": "2", "MASTER": "host0"})
    assert done.returncode == 0, done.stderr
    assert calls == {
        "torchrun": ["--nnodes", "4", "--node-rank", "2", "--nproc-per-node", "gpu",
                     "--master-addr", "host0", "--master-port", "29400", *RUN]
    }  # fmt: skip


def test_torchrun_of_other_sizes(heard):
    more = {"NODES": "1", "NODE": "0", "MASTER": "m", "RANKS_PER_NODE": "3", "PORT": "1234"}
    _, calls = heard("torchrun.sh", more)
    assert calls["torchrun"][4:10] == ["--nproc-per-node", "3", "--master-addr", "m",
                                       "--master-port", "1234"]  # fmt: skip


@pytest.mark.parametrize("missing", ["NODES", "NODE", "MASTER"])
def test_torchrun_names_what_is_missing(heard, missing):
    given = {"NODES": "4", "NODE": "2", "MASTER": "host0"}
    del given[missing]
    done, calls = heard("torchrun.sh", given)
    assert done.returncode != 0
    assert missing in done.stderr
    assert not calls


def test_slurm_starts_torchrun_on_every_node(heard):
    slurm = {"SLURM_JOB_NODELIST": "host[7-9]", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_ID": "42"}
    done, calls = heard("slurm.sbatch", slurm)
    assert done.returncode == 0, done.stderr
    assert calls["scontrol"] == ["show", "hostnames", "host[7-9]"]
    torchrun = ["--nnodes", "3", "--nproc-per-node", "gpu", "--rdzv-id", "42",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "host7:29400", *RUN]  # fmt: skip
    assert calls["torchrun"] == torchrun
    assert calls["srun"] == ["--kill-on-bad-exit=1", "torchrun", *torchrun]


def test_slurm_refuses_to_run_outside_a_job(heard):
    done, calls = heard("slurm.sbatch", {})
    assert done.returncode != 0
    assert "SLURM_JOB_NODELIST" in done.stderr
    assert not calls


def test_the_arguments_are_torchruns_own():
    """torchrun itself reads what the scripts and the indexed Job give it."""
    yaml = pytest.importorskip("yaml")
    run = pytest.importorskip("torch.distributed.run")
    _, job = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["command"] == ["torchrun"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in container["args"]]
    read = run.get_args_parser().parse_args(words)
    assert (read.nnodes, read.node_rank, read.nproc_per_node) == ("4", 3, "gpu")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(read.nnodes)
    assert read.master_addr == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert read.module
    assert read.training_script == "dcp.cli"  # the image has the library, not the laboratory
    assert read.training_script_args[0] == "train"
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
