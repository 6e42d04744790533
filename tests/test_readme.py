"""What the README and the examples show runs as written."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest
import torch

from dcp.cli import main
from scripts.run_readme import commands, run_blocks

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order():
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = run_blocks(README)
    finally:
        torch.set_num_threads(threads)
    assert torch.isfinite(names["loss"])
    assert torch.isfinite(names["q"].grad).all()


@pytest.mark.parametrize("command", commands(README))
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().err == ""


def test_the_readme_shows_the_two_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("train", "test"):
        assert f"    make {target}" in README
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_figures_of_the_readme_are_measured():
    """Each number of its table is on the page of measurements."""
    measured = set(NUMBER.findall((ROOT / "docs" / "measured.md").read_text(encoding="utf-8")))
    table = README.split("## Figures")[1].split("## Limits")[0]
    rows = re.findall(r"^\|(.+)\|(.+)\| *(measured|emulated|simulated) *\|$", table, re.MULTILINE)
    assert len(rows) > 5
    for what, value, _ in rows:
        assert set(NUMBER.findall(value)) <= measured, what


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_local_world_example():
    run_example([sys.executable, "examples/local_world.py"], "Plan(")


def test_the_training_loop_example():
    pytest.importorskip("transformers")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run_example([*launcher, "--nproc-per-node", "2", "examples/train_loop.py"], "step 9: loss")


# As torchrun starts the first, the others run on the ranks of a group that is there.


@pytest.fixture
def run_on_two(gloo_pool):
    """``run_on_two(example, *words)``: what its first rank prints."""
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)

    def run(name, *words):
        from tests.trainer_work import run_example

        path = str(ROOT / "examples" / name)
        return gloo_pool(2).run(run_example, path, [str(word) for word in words])[0]

    return run


def test_the_chat_example_learns_what_the_assistant_says(run_on_two, tmp_path):
    pytest.importorskip("peft")
    assert "plan_wait_seconds" in run_on_two("finetune_chat.py", "--output", tmp_path, "--lora")
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


def test_the_pretraining_example_takes_long_documents(run_on_two, tmp_path):
    said = run_on_two("pretrain_long.py", "--output", tmp_path, "--steps", 1)
    assert "'num_tokens': '4096'" in said
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096


def test_the_sharded_example_saves_a_whole_model(run_on_two, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said = run_on_two("finetune_sharded.py", "--output", tmp_path)
    assert "each rank has 50% of the weights" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model")("1 + 1 = ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, min_new_tokens=2).shape[1] == 10


def test_the_preference_example_spares_tokens(run_on_two, tmp_path):
    said = run_on_two("preferences_dpo.py", "--output", tmp_path, "--steps", 2)
    assert "10555 tokens less than the 25942" in said


def test_the_policy_gradient_example_raises_the_likelihood(run_on_two):
    assert "step 2: " in run_on_two("policy_gradient.py")


def test_the_video_example_trains_what_declares_its_split(run_on_two, tmp_path):
    pytest.importorskip("diffusers")
    page = (ROOT / "docs" / "data_centric.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / "data_centric_wan.py").read_text(encoding="utf-8")
    workload = example[example.index("class Clips") : example.index("def main")].rstrip()
    assert indent(workload, "    ") in page
    said = run_on_two("data_centric_wan.py", "--output", tmp_path)
    assert "'num_samples'" in said
    assert (tmp_path / "model" / "diffusion_pytorch_model.safetensors").exists()


def run_example(command, wanted):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
