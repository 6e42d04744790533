"""Messages that were damaged or made up: each is refused, or read as just what it says."""

import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from dcp import AttentionSpec, AttnMask, Cluster, Plan, RankPlan, SequenceBatch, plan, wire
from dcp.data import messages
from dcp.data.exchange import Share
from dcp.inference import KVCache
from dcp.tables import Item, Move
from dcp.wire import WireError, pack, unpack
from tests.test_inference import spread

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)
CLUSTER = Cluster(num_nodes=2, devices_per_node=2)
BATCH = SequenceBatch([70, 30, 0, 4, 1], {"a": "causal", "b": "sliding_window:window=9"})
PLAN = plan(BATCH, SPEC, CLUSTER, strategy="zigzag", block_size=16)
SHARE = Share(np.array([[3, 0, 5, 9]]), 4, True, 7, PLAN.rank_plan(1).to_bytes())


def a_cache():
    cache = KVCache(SPEC, num_layers=2, num_pages=3, page_size=4, rank=1, num_ranks=2)
    [rows] = cache.extend(["a", 7], spread([[3, 5], [0, 4]]))
    for pool in cache.pools:
        pool[rows] = torch.arange(9 * 32, dtype=pool.dtype).reshape(9, 2, 2, 8)
    return cache


def written(cache, folder):
    cache.save(folder / "of")
    return (folder / "of").read_bytes()


def readers(folder):
    """Of each kind of message: a good one, how it is read, and how what was read is written."""

    def cache_of(message):
        (folder / "of").write_bytes(message)
        return KVCache.load(folder / "of")

    return {
        "plan": (PLAN.to_bytes(), Plan.from_bytes, Plan.to_bytes),
        "rank-plan": (PLAN.rank_plan(1).to_bytes(), RankPlan.from_bytes, RankPlan.to_bytes),
        "batch-share": (SHARE.to_bytes(), Share.from_bytes, Share.to_bytes),
        "plan-request": (
            messages.request_to_bytes(BATCH, SPEC, CLUSTER, {"seed": 3}),
            messages.request_from_bytes,
            lambda found: messages.request_to_bytes(*found),
        ),
        "plan-answer": (
            messages.answer_to_bytes([b"one", b"two"]),
            messages.answer_from_bytes,
            messages.answer_to_bytes,
        ),
        "kv-cache": (written(a_cache(), folder), cache_of, lambda found: written(found, folder)),
    }


KINDS = ("plan", "rank-plan", "batch-share", "plan-request", "plan-answer", "kv-cache")


def mutated(message, kind, rng):
    """The message with one thing changed, and its checksum right."""
    if rng.random() < 0.4:
        head = wire._HEADER
        text_bytes = head.unpack_from(message)[2]
        at = int(rng.integers(head.size, len(message)))
        bits = bytearray(message)
        bits[at] ^= 1 << int(rng.integers(8))
        text, body = bits[head.size : head.size + text_bytes], bits[head.size + text_bytes :]
        crc = zlib.crc32(body, zlib.crc32(text))
        packed = head.pack(wire._MAGIC, kind.encode(), len(text), len(body), crc)
        return packed + bytes(text) + bytes(body)
    meta, arrays = unpack(kind, message)
    arrays = dict(arrays)
    name = str(rng.choice(sorted(arrays)))
    array = arrays.pop(name)
    match int(rng.integers(7)):
        case 0:
            pass  # it lacks the array
        case 1:
            arrays[name + "x"] = array
        case 2:
            arrays |= {name: array, "more": array}
        case 3:
            arrays[name] = array[..., None]
        case 4:
            arrays[name] = array[: len(array) // 2]
        case 5:
            arrays[name] = array.astype(np.float64)
        case 6:
            flat = array.copy().reshape(-1)
            if len(flat):
                odd = [-1, 1 << 62, 255] if array.dtype != np.uint8 else [255, 1, 0]
                flat[rng.integers(len(flat))] = odd[rng.integers(3)]
            arrays[name] = flat.reshape(array.shape)
    return pack(kind, meta, arrays)


def parts(kind, message):
    meta, arrays = unpack(kind, message)
    if kind == "plan-request":  # its masks may be numbered in any order, and their bands be wide
        bands = np.split(arrays["bands"], np.cumsum(arrays["num_bands"])[:-1])
        masks = [AttnMask(n, n, of) for n, of in zip(arrays["mask_length"], bands, strict=True)]
        return meta, arrays["seqlens"].tolist(), [masks[i] for i in arrays["which"].reshape(-1)]
    return meta, {name: (array.dtype, array.tolist()) for name, array in arrays.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_300_mutations_are_refused_or_read_as_they_are(kind, tmp_path):
    message, read, write = readers(tmp_path)[kind]
    assert parts(kind, write(read(message))) == parts(kind, message)
    rng = np.random.default_rng(1)
    refused, slowest = 0, 0.0
    tracemalloc.start()
    for _ in range(300):
        changed = mutated(message, kind, rng)
        began = time.thread_time()
        try:
            found = read(changed)
        except WireError as error:
            refused += "\n" not in str(error)
        else:
            assert parts(kind, write(found)) == parts(kind, changed)
        slowest = max(slowest, time.thread_time() - began)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 150
    assert slowest < 1
    assert most < 200e6


def changed_plan(name, value, kind="plan"):
    """The plan's message with one array of its first mask, or of its own, put differently."""
    message = PLAN.to_bytes() if kind == "plan" else PLAN.rank_plan(1).to_bytes()
    meta, arrays = unpack(kind, message)
    return pack(kind, meta, arrays | {name: value(arrays[name].copy())})


def put(column, value):
    def of(array):
        array[0, column] = value
        return array

    return of


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("owner", lambda a: a + 3, "owner names ranks beyond the 4"),
        ("owner", lambda a: a[:-1], "owner has shape"),
        ("block_length", lambda a: a * 2, "do not cover 105 tokens"),
        ("block_sequence", lambda a: a[::-1].copy(), "reach beyond their sequences"),
        ("seqlens", lambda a: a * (1 << 39), "out of range"),
        ("0.items", put(Item.Q_ROW, 1 << 20), "items have rows beyond their buffers"),
        ("0.items", put(Item.GROUP, 9), "items name other head groups"),
        ("0.items", put(Item.TILE, 1 << 30), "items name other tiles"),
        ("0.items", lambda a: a[::-1].copy(), "items are out of order"),
        ("0.sends", put(Move.PEER, 4), "sends name other ranks"),
        ("0.sends", put(Move.BUFFER, 4), "sends name other buffers"),
        ("0.sends", put(Move.STEP, 0), "sends are of other steps"),
        ("0.sends", lambda a: a[1:], "what is sent is not what is received"),
        ("0.slices", lambda a: a + 9, "slices reach beyond their items"),
        ("0.slices", lambda a: a[:, :5], "slices have shape"),
        ("0.tile_area", lambda a: a + 1, "tile_area is not that of the slices"),
        ("0.buffer_rows", lambda a: a * 0, "buffers lack the own tokens"),
        ("0.reduces", lambda a: a.astype(float), "not of integers"),
    ],
)
def test_what_is_wrong_with_a_plan_is_said(name, value, said):
    with pytest.raises(WireError, match=said):
        Plan.from_bytes(changed_plan(name, value))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m | {"colour": 1}, "the plan has unknown colour"),
        (lambda m: {k: v for k, v in m.items() if k != "weights"}, "the plan lacks weights"),
        (lambda m: m | {"spec": m["spec"] | {"num_heads": 4.0}}, "AttentionSpec.num_heads is 4.0"),
        (lambda m: m | {"spec": m["spec"] | {"depth": 4}}, "AttentionSpec has unknown depth"),
        (lambda m: m | {"stats": m["stats"] | {"strategy": None}}, "Stats.strategy is None"),
        (lambda m: m | {"stats": []}, r"Stats is \[\], not an object"),
        (
            lambda m: m | {"cluster": m["cluster"] | {"num_nodes": 3}},
            r"buffer_rows has shape \(4, 4\)",
        ),
        (
            lambda m: m | {"cluster": m["cluster"] | {"num_nodes": 1 << 60}},
            "num_nodes must be 65536 or less, got 1152",
        ),
        (lambda m: m | {"weights": {"a": 1}}, "weights lacks b"),
        (lambda m: m | {"num_head_groups": 3}, "num_head_groups=3 does not divide num_heads=4"),
        (lambda m: m | {"num_head_groups": True}, "num_head_groups=True"),
    ],
)
def test_what_is_wrong_with_the_fields_of_a_plan_is_said(change, said):
    meta, arrays = unpack("plan", PLAN.to_bytes())
    with pytest.raises(WireError, match=said):
        Plan.from_bytes(pack("plan", change(meta), arrays))


def raw(text, body=b"", *, kind="thing", magic=wire._MAGIC):
    crc = zlib.crc32(body, zlib.crc32(text))
    return wire._HEADER.pack(magic, kind.encode(), len(text), len(body), crc) + text + body


EMPTY = zlib.compress(b"")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (raw(b'{"meta":{},"arrays":[]}', b"plain"), "damaged dcp thing: Error -3"),
        (raw(b'{"meta":{},"arrays":[]}', EMPTY + b"x"), "not the 0 bytes announced"),
        (raw(b'{"meta":{},"arrays":[]}', zlib.compress(b"12")), "not the 0 bytes announced"),
        (raw(b'{"meta":{},"arrays":[["x","|i1",[9]]]}', EMPTY), "not the 9 bytes announced"),
        (raw(b'{"meta":{},"arrays":[["x","|O8",[9]]]}', EMPTY), "has dtype '|O8'"),
        (raw(b'{"meta":{},"arrays":[["x","|i1",[-9]]]}', EMPTY), r"has shape \[-9\]"),
        (raw(b'{"meta":{},"arrays":[["x","|i1",[9e9]]]}', EMPTY), "has shape"),
        (raw(b'{"meta":{},"arrays":[["x","<i8",[99999999999]]]}', EMPTY), "are not read"),
        (raw(b'{"meta":{},"arrays":[["x","|i1",[0]],["x","|i1",[0]]]}', EMPTY), "of one name"),
        (raw(b'{"meta":{"a":NaN},"arrays":[]}', EMPTY), "NaN is not finite"),
        (raw(b'{"meta":{"a":-1e999},"arrays":[]}', EMPTY), "-1e999 is not finite"),
        (raw(b'{"meta":[],"arrays":[]}', EMPTY), "it holds no object"),
        (raw(b"[]", EMPTY), "the header lacks arrays, meta"),
        (raw(b"{", EMPTY), "damaged dcp thing"),
        (raw(b"\xff\xfe", EMPTY), "damaged dcp thing"),
        (raw(b"[" * 100_000, EMPTY), "damaged dcp thing"),
        (raw(b"{}", magic=b"DCP\x01"), "of format 1, this dcp reads format 2"),
        (raw(b"{}", kind="other"), "expected a dcp thing, got a other"),
        (raw(b"{}", magic=b"PK\x03\x04"), "not a dcp thing"),
    ],
)
def test_what_is_no_message_is_said(message, said):
    with pytest.raises(WireError, match=said.replace("|", r"\|")):
        unpack("thing", message)


def test_what_is_not_finite_is_not_written():
    with pytest.raises(ValueError, match="cannot hold nan or infinity"):
        pack("thing", {"a": float("nan")}, {})
