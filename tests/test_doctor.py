"""``dcp doctor``: what it checks, what it says, and the trace of a run over real ranks."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

from dcp import Cluster, doctor
from dcp.cli import main
from dcp.kernel_table import KernelRates
from dcp.placement import strategy_names
from dcp.runtime import LocalWorld


def test_all_is_well_here_and_the_trace_holds_every_rank(tmp_path, capfd):
    path = tmp_path / "trace.json"
    assert main(["doctor", "--json", "--trace", str(path)]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    states = {line["check"]: line["state"] for line in lines}
    assert all(states[f"strategy {name}"] == "ok" for name in ("auto", *strategy_names()))
    taken = {line["check"]: line for line in lines if line["check"].startswith("auto, ")}
    assert list(taken) == [f"auto, {d}, {h}" for d in ("bfloat16", "float32") for h in (64, 128)]
    for line in taken.values():
        assert line["kernel"] in line["kernels"]
        assert line["kernels"][line["kernel"]]["forward_flops"] > 0
        assert line["kernels"]["dense"]["error"] < 0.1
        assert "no backward pass" in line["kernels"]["flex"]["refused"]
    assert states["kernel dense"] == states["process group of 2"] == "ok"
    events = json.loads(path.read_text())["traceEvents"]
    ran = {(e["pid"], e["name"].split()[0], e["name"].split()[1]) for e in events if e["ph"] == "X"}
    assert {(rank, way, "attention") for rank in (0, 1) for way in ("forward:", "backward:")} <= ran
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0


def test_megatron_is_checked_on_ranks(capfd):
    if find_spec("megatron") is None:
        assert main(["doctor", "--megatron", "--json"]) == 1
        said = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert said[0]["state"] == "FAILED"
        assert "pip install --no-deps megatron-core" in said[0]["detail"]
        return
    assert main(["doctor", "--megatron", "--json"]) == 0
    said = {
        (line := json.loads(text))["check"]: line for text in capfd.readouterr().out.splitlines()
    }
    assert "Megatron's own attention, error" in said["planned GPT on 2 ranks"]["detail"]
    assert "attention_dropout" in said["refused by name"]["detail"]


def test_a_base_install_suffices(tmp_path):
    """Neither the doctor, nor its ranks, nor the profile import what an extra brings."""
    for name in ("transformers", "matplotlib", "datasets", "yaml", "tqdm", "safetensors", "ray"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here')")
    code = "from dcp import doctor, profile; print(doctor._group(2, None), profile.measure_links())"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gloo, error ")
    assert "intra_node_bandwidth" in done.stdout


def test_a_wrong_result_is_found_and_told(monkeypatch, capsys):
    right = LocalWorld.attention
    monkeypatch.setattr(
        LocalWorld, "attention", lambda *args, **options: right(*args, **options) * 1.01
    )
    checks = [("kernel dense", lambda: doctor._kernel("dense")), ("wire", doctor._wire)]
    monkeypatch.setattr(doctor, "checks", lambda *_: iter(checks))
    assert main(["doctor"]) == 1
    failed, fine = capsys.readouterr().out.splitlines()
    assert failed.startswith("FAILED")
    assert "differs from dense attention" in failed
    assert fine.startswith("ok")


def test_why_a_kernel_is_taken_fits_eighty_columns(monkeypatch, capsys):
    def wrong(kernel, *_):
        return "its dk is off by 1.0" if kernel.name == "dense" else None

    monkeypatch.setattr(doctor, "trial", wrong)
    table = [
        KernelRates(
            kernel="dense", dtype="float32", head_dim=64, mask="full", sides=(64,),
            forward=(1e9,), backward=(1e9,),
        )
    ]  # fmt: skip
    cluster = Cluster(kernel_table=tuple(table))
    check = "auto, float32, 64", partial(doctor.auto_kernel, "float32", 64, cluster)
    assert doctor.report([check]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    for said in (
        "torch_cpu on cpu, to train",
        "torch_cpu: error ",
        "dense: its dk is off by 1.0",
        "flash: it runs on CUDA devices only",
        "the cluster file takes dense",
    ):
        assert said in shown
