"""Checkpoints: whole or refused by name; a job goes on where it can, whatever ended it."""

import json
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from dcp.errors import DCPError
from dcp.train import TrainConfig, checkpoint
from dcp.train.checkpoint import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dcp.train.journal import Journal
from dcp.train.model import build_llama, build_optimizer
from tests.test_train import TINY, train

CONFIG = TrainConfig(**TINY | {"hidden_size": 16, "num_layers": 1, "output": "unused"})


def make(steps=2, config=CONFIG):
    """A model and its optimiser after some steps."""
    model = build_llama(
        config, seed=1, vocab_size=20, max_positions=64, attention="eager", device="cpu"
    )
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        tokens = torch.arange(8)[None]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "step-00000002"
    save_checkpoint(folder, *make(), {"step": 2, "config": CONFIG.to_json()})
    return folder


@pytest.fixture
def copy(good, tmp_path):
    """The good checkpoint in an output folder of its own."""
    return shutil.copytree(good, tmp_path / "checkpoints" / "step-00000002")


def signed(folder):
    """Make the manifest agree with the files: whoever changed them did so on purpose."""
    files = {p.name: checkpoint._fingerprint(p) for p in folder.iterdir() if p.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


def values(model, optimizer):
    return [p.tolist() for p in model.parameters()], [
        of["exp_avg_sq"].tolist() for of in optimizer.state.values()
    ]


def test_what_is_saved_is_what_is_loaded(good):
    fresh = make(steps=0)
    state = load_checkpoint(good, *fresh)
    assert state["step"] == 2
    assert values(*fresh) == values(*make())


def refused(folder, said, steps=1):
    """It is refused with the words, and nothing of it is taken over."""
    fresh = make(steps)
    before = values(*fresh)
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(folder, *fresh)
    assert "\n" not in str(caught.value)
    assert values(*fresh) == before


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, "config.json"])
@pytest.mark.parametrize("where", [0.1, 0.6, 0.99])
def test_one_flipped_bit_is_found(copy, name, where):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)
    refused(copy, f"{name} is damaged: it is not the file that was saved")


def test_every_flipped_bit_of_the_manifest_is_found(copy):
    path = copy / MANIFEST
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="step-00000002"):
            checkpoint._check_files(copy)


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_missing_cut_and_foreign_files_are_named(copy, good, name):
    (copy / name).write_bytes((good / name).read_bytes()[:-5])
    refused(copy, f"{name} is damaged")
    save_file({"x": torch.zeros(3)}, copy / name)
    refused(copy, f"{name} is damaged")
    (copy / name).unlink()
    refused(copy, f"{name} is missing: the checkpoint is not whole")
    (copy / MANIFEST).unlink()
    refused(copy, f"is not a checkpoint: it has no {MANIFEST}")


def rewrite(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    signed(folder)


WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (OPTIMIZER, lambda t: t.pop(f"{WEIGHT}|exp_avg"), r"exp_avg is missing there, \("),
        (OPTIMIZER, lambda t: [t.pop(f"{WEIGHT}|{k}") for k in ("step", "exp_avg", "exp_avg_sq")],
         "is missing there"),
        (OPTIMIZER, lambda t: t.clear(), "is missing there"),
        (OPTIMIZER, lambda t: t[f"{WEIGHT}|exp_avg"].fill_(float("nan")), "exp_avg is not finite"),
        (OPTIMIZER, lambda t: t.update({f"{WEIGHT}|step": torch.zeros(2)}), r"step is \(2,\)"),
        (OPTIMIZER, lambda t: t.update(x=torch.zeros(2)), "x is .* there, missing here"),
        (MODEL, lambda t: t[WEIGHT][0].fill_(float("nan")), f"{WEIGHT} is not finite"),
        (MODEL, lambda t: t[WEIGHT][0].fill_(float("inf")), f"{WEIGHT} is not finite"),
        (MODEL, lambda t: t.pop(WEIGHT), "is missing there"),
        (MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].double()}), "float64 there, .* float32 here"),
        (MODEL, lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}), "is of another model"),
        (MODEL, lambda t: t.update(x=torch.zeros(2)), "x is .* there, missing here"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_named(copy, name, change, said):
    rewrite(copy, name, change)
    refused(copy, f"{name}.*{said}")


@pytest.mark.parametrize("step", [2.0, "2", -1, True, None, [2]])
def test_a_step_of_another_kind_is_refused(copy, step):
    state = json.loads((copy / STATE).read_text())
    (copy / STATE).write_text(json.dumps(state | {"step": step}))
    signed(copy)
    refused(copy, r"state\.json: step must be an integer, 0 or more, got")


@pytest.mark.parametrize("text", ["[]", "7", "{", "[" * 100_000, '{"step": 1e999}'])
def test_a_state_that_is_no_state_is_refused(copy, text):
    (copy / STATE).write_text(text)
    signed(copy)
    refused(copy, r"state\.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": "full"}, "mask was 'causal' and is 'full'"),
        ({"num_heads": 2}, "num_heads was 4 and is 2"),
        ({"num_kv_heads": 4}, "num_kv_heads was 2 and is 4"),
        ({"hidden_size": 32}, "hidden_size was 16 and is 32"),
        ({"tokenizer": "/some/where"}, "tokenizer was 'bytes' and is '/some/where'"),
    ],
)
def test_the_first_difference_of_the_job_is_named(changes, said):
    keys = {k: v for k, v in CONFIG.to_json().items() if k != "job"}
    other = TrainConfig(**keys | changes)
    with pytest.raises(ValueError, match=f"here is of another job: {said}"):
        other.require_same(CONFIG.to_json(), "here")
    TrainConfig(**keys | {"steps": 99, "learning_rate": 1.0}).require_same(CONFIG.to_json(), "here")
    for nothing in (None, [], {}, {"job": "video"}):
        with pytest.raises(ValueError, match="of another job: job was"):
            CONFIG.require_same(nothing, "here")


# --------------------------------------------------------------------------- writing


def test_a_disk_that_is_full_leaves_the_older_checkpoint(good, copy):
    """Files may not grow beyond 2,000 bytes: the weights do not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    made = make(steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        for folder in (copy, copy.with_name("step-00000003")):
            with pytest.raises(DCPError, match=f"checkpoint {folder} cannot be written: .*[Ff]ile"):
                save_checkpoint(folder, *made, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in copy.parent.iterdir()] == ["step-00000002"]
    assert load_checkpoint(copy, *make(0))["step"] == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(1, 5))
def test_a_kill_between_files_leaves_the_older_checkpoint(copy, monkeypatch, calls):
    """As SIGKILL would: nothing is cleaned up, and the next job finds what is left."""
    made, seen = make(steps=1), []

    def kill(*_, **__):
        seen.append(1)
        if len(seen) == calls:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        real = checkpoint._fingerprint
        patched.setattr(checkpoint, "_fingerprint", lambda path: (kill(), real(path))[1])
        with pytest.raises(Killed):
            save_checkpoint(copy.with_name("step-00000003"), *made, {"step": 3})
    output = copy.parent.parent
    found = find_checkpoint("latest", output)
    assert found.name == "step-00000002"
    assert load_checkpoint(found, *make(0))["step"] == 2
    save_checkpoint(found.with_name("step-00000003"), *made, {"step": 3})
    assert load_checkpoint(find_checkpoint("auto", output), *make(0))["step"] == 3
    assert sorted(p.name for p in found.parent.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_written_again_replaces_the_older(copy):
    save_checkpoint(copy, *make(steps=1), {"step": 2, "again": True})
    assert load_checkpoint(copy, *make(0))["again"]
    assert [path.name for path in copy.parent.iterdir()] == ["step-00000002"]


# --------------------------------------------------------------------------- going on


def test_metrics_that_end_in_half_a_line_are_read(tmp_path):
    lines = ['{"step": 0, "loss": 2.5}', "\0\0\0", '{"step": 1, "loss": 2.25}', "[1]", '{"step": 2']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    config = TrainConfig(**TINY | {"output": str(tmp_path)})
    journal = Journal(config, first_step=2, describe=str)
    journal.step({"step": 2, "loss": 2.0})
    journal.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in kept] == [2.5, 2.25, 2.0]


def test_auto_begins_goes_on_and_ends(gloo_pool, tmp_path):
    (tmp_path / "text.txt").write_text("one and two and three " * 40)
    values = TINY | {
        "source": str(tmp_path / "text.txt"), "output": str(tmp_path / "run"), "resume": "auto",
        "steps": 2, "hidden_size": 16, "num_layers": 1,
    }  # fmt: skip
    run = gloo_pool(2).run
    assert len(run(train, values)[0][0]) == 2
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 2, "lo')
    assert len(run(train, values | {"steps": 3})[0][0]) == 1
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [0, 1, 2]
    assert run(train, values | {"steps": 3})[0][0] == []
    said = run(refusal, values | {"steps": 4, "mask": "full"})
    assert all("state.json is of another job: mask was 'causal' and is 'full'" in s for s in said)


def refusal(values):
    with pytest.raises(ValueError, match="another job") as caught:
        train(values)
    return str(caught.value)
