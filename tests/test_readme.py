"""What the README and the examples show runs as written."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dcp.cli import main
from scripts.run_readme import PYTHON, commands, run_blocks

ROOT = Path(__file__).parents[1]
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


def test_the_chat_example_learns_what_the_assistant_says(tmp_path):
    for package in ("transformers", "accelerate", "peft"):
        pytest.importorskip(package)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "examples/finetune_chat.py", "--output", str(tmp_path)]
    run_example([*launcher, *words, "--lora"], "plan_wait_seconds")
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()


def test_the_pretraining_example_takes_long_documents(tmp_path):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "examples/pretrain_long.py", "--output", str(tmp_path)]
    run_example([*launcher, *words, "--steps", "2"], "'num_tokens': '4096'")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096


def test_the_sharded_example_saves_a_whole_model(tmp_path):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "examples/finetune_sharded.py", "--output", str(tmp_path)]
    run_example([*launcher, *words], "each rank has 50% of the weights")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "model")("1 + 1 = ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=2, min_new_tokens=2).shape[1] == 10


def test_preferences_and_policy_gradients_run_as_the_page_shows(tmp_path, monkeypatch):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    tiny = import_module("tiny")
    tokenizer = tiny.make_tokenizer()
    names = {"tokenizer": tokenizer, "model": tiny.make_model(tokenizer)}
    exec("from transformers import TrainingArguments\nimport torch", names)
    exec("from dcp.integrations.trainer import PlanningArguments", names)
    pair = {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "five"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    page = PYTHON.findall((ROOT / "docs" / "finetune.md").read_text(encoding="utf-8"))
    for word in ("PreferenceTrainer(", "DCPModel("):
        (block,) = [block for block in page if word in block]
        exec(compile(block, word, "exec"), names)
    assert names["pairs"].tokens_saved == len("2 + 2 = ") - 1
    assert [len(values) for values in names["by_answer"]] == [2, 1, 3]


def test_the_preference_example_spares_tokens(tmp_path):
    for package in ("transformers", "accelerate"):
        pytest.importorskip(package)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "examples/preferences_dpo.py", "--output", str(tmp_path)]
    run_example([*launcher, *words, "--steps", "2"], "10555 tokens less than the 25942")


def test_the_policy_gradient_example_raises_the_likelihood():
    pytest.importorskip("transformers")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run_example([*launcher, "--nproc-per-node", "2", "examples/policy_gradient.py"], "step 2: ")


def run_example(command, wanted):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout
