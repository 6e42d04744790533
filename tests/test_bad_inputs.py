"""A campaign of bad inputs: each is one line that names what is wrong, and none is a traceback."""

import json
import time

import numpy as np
import pytest

from dcp import cli
from dcp.checks import whole
from dcp.cluster import Cluster
from dcp.inference import KVCache, plan_turn
from dcp.plans import Plan
from dcp.program import RankPlan
from tests.test_inference import SPEC, cluster_of

pytest.importorskip("accelerate")
pytest.importorskip("dcp.jobs")  # which takes longer to import than a refusal

HUGE = "1" + "0" * 30
SEED = str(1 << 70)


@pytest.fixture(autouse=True)
def within_five_seconds():
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10, "a refusal is quick"


def refused(capsys, words, said, *, shown=""):
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as exit_:
        status = exit_.code
    out, err = capsys.readouterr()
    assert status == 2, (status, err)
    assert out.startswith(shown) if shown else out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "defect" not in err
    assert said in err, err


def b(**values):
    """A file of one batch."""
    return json.dumps([{"seqlens": [5]} | values])


# --------------------------------------------------------------------------- dcp plan

FILES = {
    "[" * 100_000: "is not JSON", '{"a":': "is not JSON", "": "is not JSON", "\0": "is not JSON",
    "[]": "does not hold a list", "{}": "does not hold a list", "null": "does not hold a list",
    "7": "does not hold a list", '"x"': "does not hold a list",
    "[1]": "batch 0 has no list", "[[5]]": "batch 0 has no list", "[{}]": "batch 0 has no list",
    b(seqlens=[True]): "batch 0 has no list of integers", b(seqlens=[1.5]): "batch 0 has no list",
    b(seqlens=[[1]]): "batch 0 has no list", b(seqlens="5"): "batch 0 has no list",
    b(seqlens=5): "batch 0 has no list", b(seqlens=None): "batch 0 has no list",
    b(seqlens=["5"]): "batch 0 has no list", b(seqlens={"a": 1}): "batch 0 has no list",
    '[{"seqlens": [NaN]}]': "batch 0 has no list", '[{"seqlens": [1e5]}]': "batch 0 has no list",
    b(seqlens=[-1]): "got -1", b(seqlens=[10**30]): "2147483647 or less",
    b(seqlens=[2**31]): "2147483647 or less", b(seqlens=[2**30] * 3): "2,147,483,647 tokens",
    b(nodes="2"): "batch 0: num_nodes must be a whole number, got '2'",
    b(nodes=1.5): "got 1.5", b(nodes=True): "got True", b(nodes=None): "got None",
    b(nodes=-1): "num_nodes must be 1 or more, got -1", b(nodes=0): "got 0",
    b(nodes=10**30): "num_nodes must be", b(nodes=[1]): "got [1]", b(nodes={}): "got {}",
    b(devices_per_node="8"): "got '8'", b(devices_per_node=[1.5]): "got 1.5",
    b(devices_per_node=[]): "devices_per_node", b(devices_per_node={}): "got {}",
    b(devices_per_node=[1, 2]): "names 2 of 1 nodes", b(devices_per_node=[0]): "got 0",
    b(devices_per_node=True): "got True", b(devices_per_node=-3): "got -3",
    b(devices_per_node=10**9): "devices_per_node must be",
    b(name=7): "has the name 7, no text", b(name=[1]): "has the name [1]",
    b(name=None): "has the name None", b(colour=7): "has 'colour', known are name, seqlens",
    b(mask="full"): "has 'mask', known are",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(FILES)))
def test_files_of_batches(capsys, tmp_path, number):
    text, said = list(FILES.items())[number]
    path = tmp_path / "batches.json"
    path.write_text(text)
    refused(capsys, ["plan", "--batches", path, "--strategy", "zigzag"], said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--seqlens=" + HUGE, "2147483647 or less"),
        ("--seqlens=" + "9" * 5000, "integers with commas"),
        ("--seqlens=2147483648", "got 2147483648"),
        ("--seqlens=-1", "got -1"),
        ("--seqlens=1.5", "'1.5'"),
        ("--seqlens=nan", "'nan'"),
        ("--seqlens=", "''"),
        ("--seqlens=1,,2", "'1,,2'"),
        ("--seed " + SEED, "seed must be"),
        ("--seed=-1", "got -1"),
        ("--seed x", "'x'"),
        ("--heads 0", "num_heads must be 1 or more, got 0"),
        ("--heads=-1", "got -1"),
        ("--heads 1000000000000", "num_heads must be"),
        ("--kv-heads 0", "num_kv_heads must be 1 or more, got 0"),
        ("--kv-heads 3", "num_kv_heads=3"),
        ("--head-dim 1000000000", "head_dim must be"),
        ("--head-dim " + HUGE, "head_dim must be"),
        ("--head-dim 0", "got 0"),
        ("--block-size=-1", "got -1"),
        ("--block-size 1.5", "'1.5'"),
        ("--num-divisions 0", "got 0"),
        ("--num-divisions " + HUGE, "num_divisions must be"),
        ("--num-divisions 1000000000", "num_divisions must be"),
        ("--nodes 0", "got 0"),
        ("--nodes=-1", "got -1"),
        ("--nodes " + HUGE, "num_nodes must be"),
        ("--nodes 1000000", "num_nodes must be"),
        ("--devices-per-node 0", "got 0"),
        ("--devices-per-node x", "'x'"),
        ("--devices-per-node " + HUGE, "devices_per_node must be"),
        ("--nodes 2 --devices-per-node 1,2,3", "names 3 of 2 nodes"),
        ("--cluster abacus", "'abacus'"),
        ("--cluster /tmp", "/tmp"),
        ("--save /tmp", "/tmp"),
        ("--save /no/such/x", "/no/such/x"),
        ("--report /tmp", "/tmp"),
        ("--report /no/such/x", "/no/such/x"),
        ("--trace /no/such/x", "/no/such/x"),
        ("--trace /proc/x", "/proc/x"),
        ("--mask streaming:sink=x", "x"),
        ("--mask streaming:sink=-1", "got -1"),
        ("--mask streaming:sink", "'sink'"),
        ("--mask streaming:depth=3", "depth"),
        ("--mask :", "''"),
        ("--mask causal_blockwise:block=0", "got 0"),
        ("--mask sliding_window:window=nan", "nan"),
        ("--mask sliding_window:window=0", "got 0"),
        ("--mask modality", "modality"),
        ("--mask " + "x" * 3000, "is not one of"),
        ("--dtype int8", "'int8'"),
        ("--strategy best", "'best'"),
        ("--json=yes", "--json"),
        ("--wat", "--wat"),
        ("--batches /no", "--batches"),
    ],
)
def test_options_of_plan(capsys, words, said):
    given = words.split()
    more = [] if "--seqlens" in words else ["--seqlens", "64"]
    more += [] if "--strategy" in words else ["--strategy", "zigzag"]
    writes = given[0] in ("--save", "--report", "--trace")  # after the figures were printed
    refused(capsys, ["plan", *more, *given], said, shown="64 tokens" if writes else "")


CLUSTERS = {
    "[]": "is not a cluster file", "7": "is not a cluster file", "": "is not JSON",
    "[" * 100_000: "is not JSON", "\0": "is not JSON", '{"colour": 1}': "colour",
    '{"num_nodes": "2"}': "got '2'", '{"device_flops": "x"}': "got 'x'",
    '{"device_flops": NaN}': "got nan", '{"device_flops": 0}': "got 0",
    '{"device_flops": -1}': "got -1", '{"device_flops": 1e999}': "got inf",
    '{"device_flops": true}': "got True", '{"device_flops": null}': "got None",
    '{"kernel_rates": 5}': "got 5", '{"kernel_rates": [[1]]}': "kernel_rates",
    '{"kernel_rates": [[1, "x"]]}': "got 'x'", '{"kernel_rates": [[2, 1], [1, 1]]}': "[2, 1]",
    '{"inter_node_latency": "a"}': "got 'a'", '{"inter_node_latency": -1}': "got -1",
    '{"kernel_tile": 0}': "got 0", '{"pack_bandwidth": 0}': "got 0", '{"name": 3}': "got 3",
}  # fmt: skip


@pytest.mark.parametrize("text", CLUSTERS)
def test_cluster_files(capsys, tmp_path, text):
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"cluster\.json"):
        Cluster.load(path)
    words = ["plan", "--seqlens", "64", "--strategy", "zigzag", "--cluster", path]
    refused(capsys, words, CLUSTERS[text])


# --------------------------------------------------------------------------- dcp train

BOMB = "a: &a [x,x]\n" + "".join(
    f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}]\n" for i in range(9)
)
YAML = {
    "[" * 100_000: "is not YAML", "{" * 50_000: "is not YAML", "- " * 40_000: "is not YAML",
    BOMB: "are not read: make them values", "<<: *x": "is not YAML", "? [1]\n: 2": "is not YAML",
    "? {a: 1}\n: 2": "is not YAML", "!!python/object:os.system x": "is not YAML",
    "a: b: c": "is not YAML", '"': "is not YAML", "\0": "is not YAML", "\t": "is not YAML",
    "max_steps: 2020-99-99": "is not YAML", 'max_steps: !!int "x"': "is not YAML",
    "x" * 70_000: "is not YAML",
    "1": "holds a int", "[]": "holds a list", "false": "holds a bool", "x": "holds a str",
    "max_steps: .inf": "invalid int value: 'Infinity'", "max_steps: 1e400": "'1e400'",
    "max_steps: true": "'true'", "max_steps: [1]": "'[1]'", "max_steps: 1.0": "'1.0'",
    "max_steps: 2020-01-01": "max-steps: invalid int", "max_steps: 0": "--max-steps must be 1",
    "learning_rate: .nan": "--learning-rate must be finite, got nan",
    "learning_rate: .inf": "--learning-rate must be finite, got inf",
    "learning_rate: -1": "got -1.0", "weight_decay: -.inf": "--weight-decay must be finite",
    "mask: 7": "mask '7'", "mask: round": "'round'", "seed: -1": "--seed must be from 0 to",
    "seed: 99999999999999999999999": "--seed must be from 0 to 4.29497e+09",
    "ddp_timeout: .inf": "invalid int value: 'Infinity'", "ddp_timeout: 0": "got 0",
    "ddp_timeout: -1": "got -1", "hidden_size: 7": "--hidden-size belongs to --job video",
    "job: 7": "'7'", "job: [1]": "'[1]'", "job: nope": "'nope'",
    "planning_ranks: a": "--planning-ranks must be numbers", "threads: 0": "got 0",
    "use_cpu: maybe": "Truthy value expected", "1: 2": "unknown option --1",
    "null: 3": "unknown option --None", "max_stepz: 3": "did you mean --max-steps",
    "lora_rank: 0": "got 0", "over_long: cut": "'cut'", "max_documents: -1": "got -1",
    "tokens_per_batch: 0": "got 0", "job: video\nmask: full": "--mask belongs to",
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(YAML)))
def test_configurations(capsys, tmp_path, number):
    text, said = list(YAML.items())[number]
    path = tmp_path / "job.yaml"
    path.write_text(text)
    refused(capsys, ["train", path], said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning-rate inf", "got inf"),
        ("--ddp-timeout nan", "'nan'"),
        ("--ddp-timeout x", "'x'"),
        ("--seed " + SEED, "--seed must be"),
        ("--max-steps x", "'x'"),
        ("--num-processes=-1", "got -1"),
        ("--num-processes 99999999999999", "more than this machine can start"),
        ("--output /proc/x", "/proc/x"),
        ("--output /dev/null", "/dev/null"),
        ("/tmp", "/tmp"),
        ("/no", "/no"),
        ("--job x", "'x'"),
        ("--max-steps 3 job.yaml", "a configuration file comes first"),
    ],
)
def test_options_of_train(capsys, words, said):
    refused(capsys, ["train", *words.split()], said)


# --------------------------------------------------------------------------- dcp generate


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--temperature nan", "--temperature must be a finite number, got nan"),
        ("--temperature inf", "got inf"),
        ("--temperature=-1", "--temperature must be 0 or more, got -1"),
        ("--temperature hot", "'hot'"),
        ("--top-p 1.5", "--top-p must be 1 or less, got 1.5"),
        ("--top-k 0", "--top-k must be 1 or more, got 0"),
        ("--top-k=-2", "got -2"),
        ("--seed " + SEED, "--seed must be 9223372036854775807 or less"),
        ("--seed=-1", "--seed must be 0 or more, got -1"),
        ("--max-new-tokens 0", "--max-new-tokens must be 1 or more, got 0"),
        ("--max-new-tokens " + HUGE, "--max-new-tokens must be"),
        ("--num-pages 0", "--num-pages must be 1 or more, got 0"),
        ("--num-pages " + HUGE, "--num-pages must be"),
        ("--page-size=-1", "got -1"),
        ("--num-processes 0", "got 0"),
        ("--model /no", "model '/no' is no folder"),
        ("--device tpu", "'tpu'"),
        ("--dtype int8", "'int8'"),
        ("--strategy best", "'best'"),
        ("--window-pages 0", "--window-pages must be 1 or more, got 0"),
        ("--tensor-parallel 0", "--tensor-parallel must be 1 or more, got 0"),
        ("--tensor-parallel 2", "--tensor-parallel=2 does not divide --num-processes=1"),
    ],
)
def test_options_of_generate(capsys, words, said):
    refused(capsys, ["generate", "--prompt", "x", *words.split()], said)


# --------------------------------------------------------------------------- from Python


def cache(**values):
    return KVCache(SPEC, **{"num_layers": 1, "num_pages": 2, "page_size": 4} | values)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cache(num_pages=0), "num_pages must be 1 or more, got 0"),
        (lambda: cache(page_size=-1), "page_size must be 1 or more, got -1"),
        (lambda: cache(num_pages=1 << 60), "num_pages=1152921504606846976"),
        (lambda: cache().evict("x"), "'x' is not in the cache"),
        (lambda: cache().extend(["a"], [[-1]]), r"got \[\[-1\]\]"),
        (lambda: cache().extend(["a"], [[0.5]]), r"got \[\[0.5\]\]"),
        (lambda: cache().extend(["a", "a"], [[0], [0]]), "named twice"),
        (lambda: cache().extend(["a"], np.array([1])), "owners must be a rank below 1"),
        (lambda: cache().extend(["a"], [[0] * 9]), "the KV cache is full"),
        (lambda: cache().share("a", "b", num_tokens=1), "'a' is not in the cache"),
        (lambda: cache(reach=[]), "reach is of 0 layers, there are 1"),
        (lambda: cache(window_pages=0), "window_pages must be 1 or more, got 0"),
        (lambda: KVCache.load("/no/such"), "/no/such"),
        (lambda: plan_turn([-1], [[0]], SPEC, cluster_of(1)), r"got \[-1\]"),
        (lambda: plan_turn([1], [[0]], SPEC, cluster_of(2)), "cached has shape"),
        (lambda: plan_turn([1], [[0]], SPEC, cluster_of(1), strategy="x"), "'x' is not one of"),
        (lambda: Plan.from_bytes(b""), "shorter than a header"),
        (lambda: Plan.from_bytes(bytes(100)), "not a dcp plan"),
        (lambda: RankPlan.from_bytes(b"DCP"), "shorter than a header"),
        (lambda: whole("x", 10**300), "x must be 9223372036854775807 or less"),
    ],
)
def test_calls(call, said):
    with pytest.raises((ValueError, OSError), match=said) as caught:
        call()
    assert "\n" not in str(caught.value)
