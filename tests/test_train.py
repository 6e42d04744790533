"""``dcp train``: many ranks follow one, stopping loses nothing, mistakes get one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dcp import cli
from dcp.cluster import Cluster
from tests.browser import data_of
from tests.trainer_work import launched

TINY = {
    "job": "planned",
    "config_overrides": "hidden_size=32,intermediate_size=96,num_hidden_layers=2",
    "tokens_per_batch": 600,
    "max_seqlen": 400,
    "max_steps": 20,
    "warmup_steps": 4,
    "block_size": 64,
    "planning_workers": 0,
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of 40 documents of 0 to about 900 bytes."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        text = "".join(f"{number} times {n} is {n * number}. " for n in range(number * 7 % 41))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def train(values):
    """Losses of the steps, and the final parameters on the first rank."""
    from dcp.jobs import arguments_of
    from dcp.train import planned

    group = torch.distributed.group.WORLD
    with launched():
        trainer = planned.train(values, arguments_of(values), group, torch.device("cpu"))
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        first = trainer.is_world_process_zero()
    torch.distributed.barrier()
    return losses, [p.detach().numpy() for p in trainer.model.parameters()] if first else None


@pytest.mark.parametrize("mask", ["", "streaming"])
def test_four_ranks_follow_one(gloo_pool, tmp_path, texts, mask):
    def run(world):
        values = {"data": str(texts), "output_dir": str(tmp_path / str(world)), "mask": mask}
        return gloo_pool(world).run(train, TINY | values)

    ((losses, parameters),) = run(1)
    results = run(4)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    for found, _ in results:
        assert found == results[0][0]  # the logged loss is the global one
        assert max(abs(a - b) for a, b in zip(losses, found, strict=True)) < 1e-4
    for one, four in zip(parameters, results[0][1], strict=True):
        assert abs(one - four).max() < 1e-4


def refused(values):
    with pytest.raises(ValueError, match="ulysses") as caught:
        train(values)
    return str(caught.value)


def test_a_strategy_that_cannot_serve_fails_on_all_ranks_at_once(gloo_pool, tmp_path, texts):
    heads = {"config_overrides": "num_attention_heads=1,num_key_value_heads=1"}
    values = TINY | heads | {"strategy": "ulysses", "data": str(texts)}
    assert len(gloo_pool(2).run(refused, values | {"output_dir": str(tmp_path)})) == 2


# --------------------------------------------------------------------------- the command


COMMAND = [sys.executable, "-m", "dcp.cli", "train"]


def options(values):
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]


def tiny_options(texts, output, **values):
    rest = {key: value for key, value in TINY.items() if key not in ("disable_tqdm", "use_cpu")}
    return options(rest | {"data": texts, "output": output, "max_steps": 2} | values)


def one_line(capfd):
    out, err = capfd.readouterr()
    lines = (out + err).strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("match", "content", "arguments"),
    [
        ("job.yaml: unknown option --token_per_batch; did you mean --tokens-per-batch?",
         "token_per_batch: 7", []),
        ("argument --max_steps/--max-steps: invalid int value: 'many'", "max_steps: many", []),
        ("is not YAML", "steps: [", []),
        ("holds a list", "[1, 2]", []),
        ("--max-steps must be 1 or more, or -1 for epochs, got 0", "", ["--max-steps=0"]),
        ("mask 'round' is not one of", "", ["--mask=round"]),
        ("strategy 'luck' is not one of", "", ["--strategy=luck"]),
        ("--num-processes 100000 is more than this machine can start", "",
         ["--num-processes=100000"]),
        ("--num-processes must be 1 or more, got 0", "", ["--num-processes=0"]),
    ],
)  # fmt: skip
def test_mistakes_in_the_configuration_get_one_line(tmp_path, capfd, match, content, arguments):
    (tmp_path / "job.yaml").write_text(content)
    arguments = [f"--output={tmp_path}", *arguments]
    assert cli.main(["train", str(tmp_path / "job.yaml"), *arguments]) == 2
    assert match in one_line(capfd)


def test_a_missing_config_file_gets_one_line(capfd):
    assert cli.main(["train", "/no/such/job.yaml"]) == 2
    assert "/no/such/job.yaml" in one_line(capfd)


def test_files_and_options_make_one_job(tmp_path):
    from dcp.jobs import arguments_of, read_options

    (tmp_path / "job.json").write_text(
        '{"max_steps": 5, "learning_rate": 1, "lora": true, "use_cpu": true, "seed": null}'
    )
    words = [str(tmp_path / "job.json"), "--max-steps", "7", "--num-processes", "3"]
    given, num_processes = read_options(words)
    assert num_processes == 3
    assert given == {
        "job": "planned", "max_steps": 7, "learning_rate": 1.0, "lora": True, "use_cpu": True
    }  # fmt: skip
    with launched():
        model, _, _, run = arguments_of(given)
    assert model.lora
    assert (run.max_steps, run.learning_rate, run.weight_decay) == (7, 1.0, 0.1)  # from scratch
    again, _ = read_options([str(tmp_path / "job.json"), "--lr-scheduler-type", "linear"])
    with launched():
        assert arguments_of(again)[-1].lr_scheduler_type == "linear"


def test_a_folder_is_fine_tuned_by_trainers_own_defaults(tmp_path):
    from dcp.jobs import arguments_of

    with launched():
        run = arguments_of({"job": "planned", "model": str(tmp_path), "use_cpu": True})[-1]
    assert (run.max_steps, run.num_train_epochs, run.learning_rate) == (-1, 3.0, 5e-5)


def test_the_command_trains_and_fine_tunes(gloo_pool, tmp_path, texts, capfd):
    """A model from nothing; then, of its folder, what the assistant of some chats says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = tiny_options(texts, tmp_path / "run", eval_data=texts)
    assert cli.main(["train", "--num-processes=2", *arguments]) == 0
    shown = capfd.readouterr().err
    for words in ("loss", "tokens/s", "balance", "MB moved", "waiting for plans"):
        assert words in shown
    for name in ("model", "metrics.jsonl", "training.html", "plan.html"):
        assert str(tmp_path / "run" / name) in shown
        assert (tmp_path / "run" / name).exists()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert lines[0]["compute_balance"] >= 1
    assert lines[0]["num_tokens"] <= 600
    page = data_of((tmp_path / "run/training.html").read_text())
    assert page["reload_seconds"] is None  # the job is over
    assert page["step"] == [1, 2]
    assert page["series"]["loss"]["mean"] == pytest.approx([line["loss"] for line in lines[:2]])
    assert page["evaluations"]["eval_loss"][-1] == lines[-1]["eval_loss"]
    assert len(page["ranks"]["memory_bytes"]) == len(page["ranks"]["plan_wait_seconds"]) == 2
    assert lines[1]["max_rank_memory_bytes"] == max(page["ranks"]["memory_bytes"]) > 1e7
    assert 0 < lines[-1]["eval_loss"] < 10

    folder = tmp_path / "run" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("aé").input_ids == [256, *"aé".encode(), 257]
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 20)
    words = {"model": folder, "data": tmp_path / "chat.jsonl", "max_steps": 3,
             "output": tmp_path / "tuned", "learning_rate": 0.01,
             "use_cpu": True, "assistant_only": True, "planning_workers": 0}  # fmt: skip
    from dcp.jobs import read_options

    gloo_pool(2).run(train, read_options(options(words))[0])
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "tuned/model")
    )
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert prompt == [256, *b"user: 2 + 2?", 257, *b"assistant: "]
    prompt = torch.tensor([prompt])
    reply = after.generate(prompt, max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    assert reply.shape == (1, prompt.shape[1] + 5)
    chances = [model(prompt).logits[0, -1].log_softmax(-1)[ord("4")] for model in (before, after)]
    assert chances[1] > chances[0] + 0.1


def test_adapters_are_merged_and_kept(gloo_pool, tmp_path, texts):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    values = TINY | {"data": str(texts), "max_steps": 1}
    base, out = tmp_path / "base", tmp_path / "out"
    gloo_pool(1).run(train, values | {"output_dir": str(base)})
    del values["config_overrides"]
    more = {"model": str(base / "model"), "output_dir": str(out), "lora": True}
    gloo_pool(2).run(train, values | more | {"learning_rate": 0.01, "max_steps": 2})
    merged = AutoModelForCausalLM.from_pretrained(out / "model")
    whole = AutoModelForCausalLM.from_pretrained(base / "model")
    prompt = torch.tensor([[256, *b"3 times"]])
    unchanged = whole(prompt).logits
    adapted = PeftModel.from_pretrained(whole, out / "adapter")(prompt).logits
    assert (merged(prompt).logits - adapted).abs().max() < 1e-5
    assert (adapted - unchanged).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("tokens, more than max_seqlen=400", {"over_long": "raise"}),
        ("is neither a path or pattern here", {"data": "/no/such/texts"}),
        ("there is no checkpoint to resume", {"resume_from_checkpoint": "latest"}),
        ("a llama has no 'width'", {"config_overrides": "width=3"}),
        ("--model '/no/such' is neither a folder", {"model": "/no/such"}),
        ("--assistant-only needs messages", {"assistant_only": True}),
        ("--max-seqlen must be at most tokens_per_batch=50, got 400", {"tokens_per_batch": 50}),
    ],
)
def test_what_cannot_be_trained_is_named(gloo_pool, tmp_path, texts, match, values):
    values = TINY | {"data": str(texts), "output_dir": str(tmp_path)} | values
    with pytest.raises(AssertionError, match=f"ValueError: .*{match}"):
        gloo_pool(1).run(train, values)


def test_a_rank_that_refuses_ends_the_job_with_one_line(tmp_path, texts, capfd):
    arguments = tiny_options(texts, tmp_path, over_long="raise")
    assert cli.main(["train", "--num-processes=2", *arguments]) == 1
    line = one_line(capfd)
    assert line.startswith("dcp train: rank ")
    assert "tokens, more than max_seqlen=400" in line
    assert "Traceback" not in line


def wait_for_step(job, metrics, step):
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)


def test_a_killed_rank_ends_the_job(tmp_path, texts):
    arguments = tiny_options(texts, tmp_path, max_steps=100000)
    job = subprocess.Popen(
        [*COMMAND, "--num-processes=2", "--disable-tqdm=true", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(job, tmp_path / "metrics.jsonl", 1)
    victim = rank_pids(job.pid)[1]
    os.kill(victim, signal.SIGKILL)
    _, shown = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "dcp train: rank 1 was killed by SIGKILL" in shown
    assert not rank_pids(job.pid)


def test_a_killed_job_that_goes_on_ends_as_the_undisturbed_one(gloo_pool, tmp_path, texts):
    """``auto`` begins where nothing is, and later takes the last whole checkpoint."""
    from safetensors.numpy import load_file

    values = TINY | {"data": str(texts), "max_steps": 24, "save_strategy": "steps", "save_steps": 3,
                     "save_total_limit": 2, "resume_from_checkpoint": "auto",
                     "calibrate": False}  # fmt: skip
    whole, killed = ({**values, "output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    gloo_pool(2).run(train, whole)
    (tmp_path / "job.json").write_text(json.dumps(killed))
    command = [*COMMAND, str(tmp_path / "job.json"), "--num-processes=2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as job:
        wait_for_step(job, tmp_path / "killed" / "metrics.jsonl", 8)
        ranks = rank_pids(job.pid)
        for pid in [job.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
    gloo_pool(2).run(train, killed)
    one, other = (load_file(tmp_path / name / "model/model.safetensors")
                  for name in ("whole", "killed"))  # fmt: skip
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert len(list((tmp_path / "whole").glob("checkpoint-*"))) == 2
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()
             for name in ("whole", "killed")]  # fmt: skip
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


def start_ranks(world, folder, values):
    """Ranks as torchrun on many machines starts them: no launcher sees all of them."""
    (folder / "job.json").write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    ranks = []
    for rank in range(world):
        variables = common | {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [*COMMAND, str(folder / "job.json")]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=environment))
    return ranks


@pytest.mark.parametrize(("world", "victim"), [(2, 0), (3, 1)])
def test_every_rank_names_the_one_that_was_killed(tmp_path, texts, world, victim):
    values = TINY | {"data": str(texts), "output_dir": str(tmp_path), "max_steps": 100000}
    ranks = start_ranks(world, tmp_path, values | {"ddp_timeout": 30})
    try:
        wait_for_step(ranks[0], tmp_path / "metrics.jsonl", 1)
        ranks[victim].send_signal(signal.SIGKILL)
        left = [rank for rank in range(world) if rank != victim]
        for rank in left:
            _, shown = ranks[rank].communicate(timeout=50)
            assert ranks[rank].returncode == 1
            line = shown.decode().splitlines()[-1]
            assert line.startswith(f"dcp train: rank {rank}: rank {victim}")
            assert " died" in line
            assert b"Traceback" not in shown
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def rank_pids(parent):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def test_rates_are_learnt_and_left_as_a_cluster_file(gloo_pool, tmp_path, texts):
    values = TINY | {"data": str(texts), "max_steps": 8}
    gloo_pool(2).run(train, values | {"output_dir": str(tmp_path)})
    learnt = Cluster.load(tmp_path / "cluster.json")
    preset = Cluster.preset("laptop", devices_per_node=2)
    assert learnt.num_ranks == 2
    assert learnt.intra_node_bandwidth != preset.intra_node_bandwidth  # measured as it began
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["predicted_over_measured"] > 0 for line in lines[2:])
