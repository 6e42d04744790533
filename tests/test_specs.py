"""What a batch, a spec, a cluster or a planner refuses, with the field and the value, and takes."""

import sys

import numpy as np
import pytest

from dcp import AttentionSpec, AttnMask, Cluster, SequenceBatch
from dcp.batch import MOST_TOKENS, MOST_WIDTH
from dcp.checks import number, positive, whole, whole_numbers
from dcp.cluster import MOST_RANKS
from dcp.planner import MOST_SEED, Planner
from dcp.schedule import MOST_DIVISIONS

NAN, INF = float("nan"), float("inf")
SPEC = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16)
NOT_WHOLE = ("8", 2.5, 3.0, NAN, INF, None, True, np.True_, [4], (), b"8", 1j, np.float32(2))
NOT_POSITIVE = ("1e9", None, NAN, INF, -INF, -1, 0, 0.0, True, [1.0], 10**400, np.nan)
BAD_LENGTHS = [
    *("35", b"35", "", None, 35, 3.7, NAN, {}, {3: 4}, True, ...),
    *([3.7], [3.0], [True], [np.True_], [-1], [5, -1], [2**31], [2**40], [2**63], [2**70], [10**400]),  # noqa: E501
    *([[3, 4]], [[]], [[3], [4, 5]], [NAN], [INF], [None], ["3"], [b"3"], [3, "4"], [1j]),
    *([MOST_TOKENS, 1], range(-1, 3), (n / 2 for n in (1, 2)), iter("35")),
    *(np.array([3.0]), np.array([NAN]), np.array([True]), np.array([[3]]), np.array(3)),
    *(np.array(["3"]), np.array([2**63], dtype=np.uint64), np.array([None])),
]  # fmt: skip


def spec(**fields):
    return AttentionSpec(**{"num_heads": 8, "num_kv_heads": 2, "head_dim": 16, **fields})


def refused(make, *words):
    with pytest.raises(ValueError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    for word in words:
        assert word in message


@pytest.mark.parametrize("seqlens", BAD_LENGTHS, ids=lambda value: repr(value)[:30])
def test_lengths_that_are_none(seqlens):
    refused(lambda: SequenceBatch(seqlens), "seqlens")


@pytest.mark.parametrize(
    ("seqlens", "words"),
    [
        ("35", "seqlens must be a list of whole numbers, got '35'"),
        ([3, 3.7], "seqlens[1] must be a whole number, got 3.7"),
        ([4, 2, -1], "seqlens[2] must be 0 or more, got -1"),
        ([2**40], f"seqlens[0] must be {MOST_TOKENS} or less, got {2**40}"),
        ([True], "seqlens[0] must be a whole number, got True"),
        ([2**30] * 3, "at most 2,147,483,647 tokens, these seqlens sum to 3,221,225,472"),
    ],
)
def test_the_words_name_the_length(seqlens, words):
    refused(lambda: SequenceBatch(seqlens), words)


@pytest.mark.parametrize(
    "seqlens",
    [
        [3, 0, 5],
        (3, 0, 5),
        np.array([3, 0, 5]),
        np.array([3, 0, 5], dtype=np.uint8),
        [np.int32(3), np.uint64(0), 5],
        (n for n in (3, 0, 5)),
        {3: "a", 0: "b", 5: "c"}.keys(),
    ],
)
def test_lengths_of_every_integer_kind(seqlens):
    batch = SequenceBatch(seqlens)
    assert batch.seqlens.tolist() == [3, 0, 5]
    assert batch.seqlens.dtype == np.int64
    assert batch.area() == 6 + 15


def test_no_sequence_and_the_longest_one():
    assert SequenceBatch([]).num_tokens == SequenceBatch(np.array([])).num_tokens == 0
    longest = SequenceBatch([MOST_TOKENS], "full")
    assert longest.area() == MOST_TOKENS**2


@pytest.mark.parametrize(
    "masks",
    [
        *(None, 3, 2.5, True, b"causal", "", "casual", "causal:seqlen=2", {}, [], [None, None]),
        *({"a": None}, {3: "causal"}, {"a": ["causal"]}, ["causal"], ["causal"] * 3, [3, 4]),
        *([AttnMask.causal(4), AttnMask.causal(5)], AttnMask.causal(4), {"a": AttnMask.causal(9)}),
        *([["causal"], "full"], [np.zeros((4, 2)), "causal"], np.zeros((4, 2)), ...),
        *([AttnMask.causal(4), np.array([[0, 9]] * 5)], [b"causal", "causal"]),
    ],
)  # fmt: skip
def test_masks_of_wrong_kinds_and_lengths(masks):
    refused(lambda: SequenceBatch([4, 3], masks), "mask")


def test_masks_of_every_kind():
    ranges = np.stack([np.zeros(3, dtype=int), np.arange(1, 4)], axis=1)
    for masks in ("causal", ["causal", ranges], (AttnMask.causal(4), "causal")):
        assert SequenceBatch([4, 3], masks).area() == 10 + 6
    assert SequenceBatch([4, 3], (name for name in ("causal", "full"))).area() == 10 + 9
    assert SequenceBatch([3], {"a": AttnMask.full(3), "b": "causal"}).mask_names == ["a", "b"]


@pytest.mark.parametrize("weight", NOT_POSITIVE, ids=repr)
def test_weights_that_are_no_counts_of_layers(weight):
    masks = {"a": "causal", "b": "full"}
    refused(lambda: SequenceBatch([4], masks, weights={"a": 1, "b": weight}), "weights['b']")


def test_weights_of_no_mask_or_of_another_kind():
    for weights in ({"c": 1}, {"a": 1, 3: 1}):
        refused(lambda w=weights: SequenceBatch([4], {"a": "full"}, weights=w), "unknown masks")
    for weights in ([1], "a", 3, 2.5):
        refused(lambda w=weights: SequenceBatch([4], {"a": "full"}, weights=w), "weights must map")
    two = SequenceBatch([4], {"a": "full", "b": "causal"}, weights={"a": np.float32(2.5)})
    assert two.weights == {"a": 2.5, "b": 1.0}


@pytest.mark.parametrize(
    "cached",
    [
        *(3, "1", [1, 2], [[1, 2]], [[1], [2], [3]], [[1], [2, 3]], [[1.5], [0]], [[True], [False]]),  # noqa: E501
        *([[-1], [0]], [[5], [0]], [[3, 2], [0, 0]], [["1"], ["0"]], [[None], [0]], [[NAN], [0]]),
        *([[2**70], [0]], [[2**62, 2**62], [0, 0]], {}, [[[1]], [[0]]]),
    ],
)  # fmt: skip
def test_cached_tokens_that_are_none(cached):
    refused(lambda: SequenceBatch([4, 3], "causal", cached=cached), "cached")


def test_cached_tokens_of_every_integer_kind():
    for cached in ([[1, 2], [0, 3]], np.array([[1, 2], [0, 3]], dtype=np.uint8)):
        batch = SequenceBatch([4, 3], "causal", cached=cached)
        assert batch.num_cached.tolist() == [3, 3]
        assert batch.area() == 4


@pytest.mark.parametrize("field", ["num_heads", "num_kv_heads", "head_dim"])
@pytest.mark.parametrize("value", [*NOT_WHOLE, 0, -8, MOST_WIDTH + 1, 2**63, 10**30], ids=repr)
def test_specs_that_are_none(field, value):
    refused(lambda: spec(**{field: value}), field)


@pytest.mark.parametrize("dtype", ["int8", "float", None, 16, "", [], np.float32, "float128"])
def test_dtypes_that_are_none(dtype):
    refused(lambda: spec(dtype=dtype), "dtype", "is not one of float64, float32")


def test_specs_of_every_integer_kind():
    assert spec(num_heads=np.int64(8), head_dim=np.uint16(16)) == SPEC
    refused(lambda: spec(num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=8")
    assert isinstance(spec(num_heads=np.int64(8)).num_heads, int)


@pytest.mark.parametrize(
    "field",
    [
        *("inter_node_bandwidth", "device_network_bandwidth", "intra_node_bandwidth"),
        *("device_flops", "memory_bandwidth", "backward_ratio"),
    ],
)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
def test_rates_that_are_none(field, value):
    refused(lambda: Cluster(**{field: value}), field)


@pytest.mark.parametrize("field", ["inter_node_latency", "intra_node_latency", "launch_seconds"])
@pytest.mark.parametrize("value", ["0", None, NAN, INF, -1e-9, True, [0.0]], ids=repr)
def test_latencies_that_are_none(field, value):
    refused(lambda: Cluster(**{field: value}), field)
    assert getattr(Cluster(**{field: 0}), field) == 0.0


@pytest.mark.parametrize("field", ["num_nodes", "kernel_tile", "devices_per_node"])
@pytest.mark.parametrize("value", [*NOT_WHOLE, 0, -1, 10**6, sys.maxsize, 10**30], ids=repr)
def test_sizes_of_clusters_that_are_none(field, value):
    if field == "devices_per_node" and value == [4]:
        assert Cluster(devices_per_node=value).num_ranks == 4  # one number a node is a list
        return
    refused(lambda: Cluster(**{field: value}), field)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_nodes": 2, "devices_per_node": (4,)}, "devices_per_node names 1 of 2 nodes"),
        ({"num_nodes": 2, "devices_per_node": (4, 0)}, "devices_per_node[1] must be 1 or more"),
        ({"num_nodes": 2, "devices_per_node": (4, 2.5)}, "devices_per_node[1] must be a whole"),
        ({"num_nodes": 2, "devices_per_node": "44"}, "devices_per_node must be a whole number"),
        ({"num_nodes": 10_000, "devices_per_node": 8}, f"80,000 ranks are too many (at most {MOST_RANKS:,})"),  # noqa: E501
        ({"kernel_rates": None}, "kernel_rates must be (side, rate) pairs, got None"),
        ({"kernel_rates": [128]}, "kernel_rates must be (side, rate) pairs"),
        ({"kernel_rates": "ab"}, "kernel_rates must be (side, rate) pairs"),
        ({"kernel_rates": [(128, 1e9), (64, 1e9)]}, "kernel_rates must have ascending sides, got [128, 64]"),  # noqa: E501
        ({"kernel_rates": [(64, 1e9), (64, 2e9)]}, "kernel_rates must have ascending sides"),
        ({"kernel_rates": [(0, 1e9)]}, "kernel_rates side[0] must be 1 or more, got 0"),
        ({"kernel_rates": [(64.5, 1e9)]}, "kernel_rates side[0] must be a whole number, got 64.5"),
        ({"kernel_rates": [(64, NAN)]}, "kernel_rates rate must be a finite number, got nan"),
        ({"kernel_rates": [(64, 0)]}, "kernel_rates rate must be more than 0, got 0"),
        ({"pack_bandwidth": 0}, "pack_bandwidth must be more than 0, got 0"),
        ({"pack_bandwidth": "x"}, "pack_bandwidth must be a number, got 'x'"),
        ({"name": 3}, "name must be a string, got 3"),
    ],
)  # fmt: skip
def test_clusters_that_are_none(fields, words):
    refused(lambda: Cluster(**fields), words)


def test_clusters_of_every_kind(tmp_path):
    made = Cluster(
        num_nodes=np.int64(2),
        devices_per_node=[np.int32(3), 1],
        intra_node_bandwidth=np.float64(1e9),
        device_flops=10**12,
        kernel_rates=[[64, 10**9], (np.int64(128), 2e9)],
    )
    assert made.num_ranks == 4
    assert made.kernel_rates == ((64, 1e9), (128, 2e9))
    made.save(tmp_path / "cluster.json")
    assert Cluster.load(tmp_path / "cluster.json") == made


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("tolerance", tuple(each for each in NOT_POSITIVE if each is not None)),
        ("token_limit", ("1.2", None, NAN, INF, 0, 0.99, True)),
        ("max_rank_tokens", tuple(each for each in (*NOT_WHOLE, 0, -1) if each is not None)),
        ("second_within", ("1", None, NAN, INF, -0.1, True)),
        ("time_budget", ("1", None, NAN, INF, -1, True)),
        ("seed", (*NOT_WHOLE, -1, MOST_SEED + 1, 2**70)),
        ("num_divisions", ("4", 2.5, True, NAN, 0, -1, MOST_DIVISIONS + 1, 10**9)),
        ("model_width", ("4", 2.5, True, NAN, -1, [4096])),
        ("block_size", (*NOT_WHOLE, 0, -1, "x", "AUTO", "")),
        ("cache_size", (*NOT_WHOLE, -1)),
        ("strategy", ("rign", "", None, 3, ["ring"], b"ring", True)),
    ],
)
def test_options_that_are_none(option, values):
    for value in values:
        refused(lambda v=value: Planner(SPEC, Cluster(), **{option: v}), option)


def test_options_of_every_kind_are_used_and_other_objects_refused():
    planner = Planner(
        SPEC,
        Cluster(devices_per_node=2),
        block_size=np.int64(8),
        seed=MOST_SEED,
        num_divisions=np.int8(2),
        model_width=0,
        time_budget=0,
        tolerance=np.float32(0.5),
    )
    made = planner.plan(SequenceBatch([40, 3]))
    assert made.num_tokens == 43
    assert made.stats.block_size == 8
    refused(lambda: Planner(None, Cluster()), "spec and cluster must be", "NoneType")
    refused(lambda: Planner(SPEC, 8), "spec and cluster must be", "a int")
    refused(lambda: planner.plan([40, 3]), "the batch is a list")
    for rank in (True, 2, -1, 0.5, "0", None):
        refused(lambda r=rank: made.token_indices(r), f"rank {rank!r} is not one of")


def test_the_checks_return_plain_numbers():
    assert type(whole("n", np.uint8(3))) is type(whole("n", 3)) is int
    assert type(number("x", 3)) is type(positive("x", np.float32(3))) is float
    assert whole_numbers("n", [], least=1).dtype == np.int64
    refused(lambda: whole("n", 3, least=4), "n must be 4 or more, got 3")
    refused(lambda: whole("n", 3, most=2), "n must be 2 or less, got 3")
    refused(lambda: number("x", -1), "x must be 0 or more, got -1")
