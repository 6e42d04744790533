"""Training: many ranks follow one, stopping loses nothing, mistakes get one line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")

from dcp import cli
from dcp.train import TrainConfig

TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "tokens_per_batch": 600,
    "max_seqlen": 400,
    "steps": 20,
    "learning_rate": 3e-3,
    "warmup_steps": 4,
    "block_size": 64,
    "progress": False,
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
    """Losses, and the final parameters on the first rank."""
    from dcp.train.trainer import Trainer

    with Trainer(TrainConfig(**values), torch.distributed.group.WORLD) as trainer:
        losses = trainer.train()
        parameters = [p.detach().numpy() for p in trainer.model.parameters()]
    torch.distributed.barrier()
    return losses, parameters if trainer.rank == 0 else None


@pytest.mark.parametrize("mask", ["causal", "streaming"])
def test_four_ranks_follow_one(gloo_pool, tmp_path, texts, mask):
    def run(world):
        values = {"source": str(texts), "output": str(tmp_path / str(world)), "mask": mask}
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


def test_stopping_and_resuming_changes_nothing(gloo_pool, tmp_path, texts):
    values = TINY | {"source": str(texts), "output": str(tmp_path), "checkpoint_every": 6}
    (whole, parameters), _ = gloo_pool(2).run(train, values)
    resumed = {"resume": str(tmp_path / "checkpoints" / "step-00000012")}
    for world in (2, 1):
        rest, again = gloo_pool(world).run(train, values | resumed)[0]
        exact = 0 if world == 2 else 1e-4  # another number of ranks sums in another order
        assert len(rest) == 8
        assert max(abs(a - b) for a, b in zip(whole[12:], rest, strict=True)) <= exact
        assert max(abs(a - b).max() for a, b in zip(parameters, again, strict=True)) <= exact
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(20))
    assert {path.suffix for path in (tmp_path / "checkpoints/step-00000018").iterdir()} == {
        ".json",
        ".safetensors",
    }


def refused(values):
    with pytest.raises(ValueError, match="ulysses") as caught:
        train(values)
    return str(caught.value)


def test_a_strategy_that_cannot_serve_fails_on_all_ranks_at_once(gloo_pool, tmp_path, texts):
    heads = {"num_heads": 1, "num_kv_heads": 1, "strategy": "ulysses"}
    values = TINY | heads | {"source": str(texts), "output": str(tmp_path)}
    assert len(gloo_pool(2).run(refused, values)) == 2


def test_a_checkpoint_is_a_transformers_model(gloo_pool, tmp_path, texts):
    from transformers import LlamaForCausalLM

    values = TINY | {"source": str(texts), "output": str(tmp_path), "steps": 2}
    ((_, parameters),) = gloo_pool(1).run(train, values)
    folder = tmp_path / "checkpoints" / "step-00000002"
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for found, wanted in zip(model.parameters(), parameters, strict=True):
        assert (found.detach().numpy() == wanted).all()


# --------------------------------------------------------------------------- the command


COMMAND = [sys.executable, "-m", "dcp.cli", "train"]


def options(values):
    return [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]


def tiny_options(texts, output, **values):
    rest = {key: value for key, value in TINY.items() if key != "progress"}
    return options(rest | {"source": texts, "output": output, "steps": 2} | values)


def one_line(capfd):
    out, err = capfd.readouterr()
    lines = (out + err).strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("match", "content", "arguments"),
    [
        ("unknown config key 'token_per_batch'; did you mean 'tokens_per_batch'?",
         "token_per_batch: 7", []),
        ("config key steps must be of type int, got 'many'", "steps: many", []),
        ("is not YAML", "steps: [", []),
        ("holds a list", "[1, 2]", []),
        ("num_kv_heads=3 does not divide num_heads=4", "", ["--num-kv-heads=3"]),
        ("steps must be 1 or more, got -1", "", ["--steps=-1"]),
        ("mask 'round' is not one of", "", ["--mask=round"]),
        ("strategy 'luck' is not one of", "", ["--strategy=luck"]),
        ("max_seqlen must be at most tokens_per_batch=50, got 4096", "tokens_per_batch: 50", []),
        ("--num-processes 100000 is more than this machine can start", "",
         ["--num-processes=100000"]),
        ("--num-processes must be 1 or more, got 0", "", ["--num-processes=0"]),
    ],
)  # fmt: skip
def test_mistakes_in_the_configuration_get_one_line(tmp_path, capfd, match, content, arguments):
    (tmp_path / "job.yaml").write_text(content)
    assert cli.main(["train", str(tmp_path / "job.yaml"), *arguments]) == 2
    assert match in one_line(capfd)


def test_a_missing_config_file_gets_one_line(capfd):
    assert cli.main(["train", "/no/such/job.yaml"]) == 2
    assert "/no/such/job.yaml" in one_line(capfd)


def test_files_and_options_make_one_config(tmp_path):
    (tmp_path / "job.json").write_text('{"steps": 5, "learning_rate": 1}')
    config = TrainConfig.load(tmp_path / "job.json", {"steps": 7})
    assert (config.steps, config.learning_rate) == (7, 1.0)
    config.save(tmp_path / "again.json")
    assert TrainConfig.load(tmp_path / "again.json") == config
    (tmp_path / "job.yaml").write_text("learning_rate: 3e-3\n")
    assert TrainConfig.load(tmp_path / "job.yaml").learning_rate == 3e-3


def test_the_command_trains_and_reports(tmp_path, texts, capfd):
    arguments = tiny_options(texts, tmp_path / "run")
    assert cli.main(["train", "--num-processes=2", *arguments]) == 0
    shown = capfd.readouterr().err
    assert all(word in shown for word in ("loss", "tokens/s", "balance", "MB moved"))
    (first, second) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 1)
    assert first["compute_balance"] >= 1
    assert first["num_tokens"] <= 600
    assert cli.main(["train", "--num-processes=1", *arguments, "--resume=latest", "--steps=3"]) == 0
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("match", "values"),
    [
        ("tokens, more than max_seqlen=400", {"over_long": "raise"}),
        ("is neither a path or pattern here", {"source": "/no/such/texts"}),
        ("no checkpoint in", {"resume": "latest"}),
    ],
)
def test_a_rank_that_refuses_ends_the_job_with_one_line(tmp_path, texts, capfd, match, values):
    arguments = tiny_options(texts, tmp_path, **values)
    assert cli.main(["train", "--num-processes=2", *arguments]) == 1
    line = one_line(capfd)
    assert line.startswith("dcp train: rank ")
    assert match in line
    assert "Traceback" not in line


def test_a_killed_rank_ends_the_job(tmp_path, texts):
    arguments = tiny_options(texts, tmp_path, steps=100000)
    job = subprocess.Popen(
        [*COMMAND, "--num-processes=2", "--no-progress", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert job.poll() is None
        time.sleep(0.1)
    victim = rank_pids(job.pid)[1]
    os.kill(victim, signal.SIGKILL)
    _, shown = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "dcp train: rank 1 was killed by SIGKILL" in shown
    assert not rank_pids(job.pid)


def start_ranks(world, folder, values):
    """Ranks as torchrun on many machines starts them: no launcher sees all of them."""
    import socket

    TrainConfig(**values).save(folder / "config.json")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
    ranks = []
    for rank in range(world):
        variables = common | {"MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [*COMMAND, str(folder / "config.json")]
        ranks.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=environment))
    return ranks


@pytest.mark.parametrize(("world", "victim"), [(2, 0), (3, 1)])
def test_every_rank_names_the_one_that_was_killed(tmp_path, texts, world, victim):
    values = TINY | {"source": str(texts), "output": str(tmp_path), "steps": 100000}
    ranks = start_ranks(world, tmp_path, values | {"timeout_seconds": 30.0})
    metrics = tmp_path / "metrics.jsonl"
    try:
        while not metrics.exists() or not metrics.read_text():
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
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
