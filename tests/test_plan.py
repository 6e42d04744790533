"""Plans are right for any batch, mask and cluster; they say what they cost; they survive travel."""

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from dcp import AttentionSpec, AttnMask, Cluster, Plan, RankPlan, SequenceBatch, plan, wire
from dcp.placement import StrategyError, strategy_names
from dcp.tables import Item, Move
from dcp.wire import WireError, pack, unpack
from tests.cases import cases
from tests.oracle import batch_mask
from tests.symbolic import check_plan


@given(case=cases(), strategy=st.sampled_from(strategy_names()), size=st.integers(1, 40),
       divisions=st.integers(1, 6), seed=st.integers(0, 9))  # fmt: skip
def test_every_pair_once_and_programs_sound(case, strategy, size, divisions, seed):
    batch, cluster = case
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8)
    options = {"strategy": strategy, "block_size": size, "num_divisions": divisions}
    try:
        a_plan = plan(batch, spec, cluster, **options)
    except StrategyError:
        reject()
    check_plan(a_plan, "default", batch_mask(batch).numpy(), seed=seed)
    indices = np.concatenate([a_plan.token_indices(r) for r in range(a_plan.num_ranks)])
    assert sorted(indices.tolist()) == list(range(batch.num_tokens))


def small_plan(**options):
    batch = SequenceBatch([700, 300, 0, 41, 5], "causal")
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16)
    return plan(batch, spec, Cluster(num_nodes=2, devices_per_node=2), **options)


def test_stats_agree_with_a_count_by_hand():
    a_plan = small_plan(strategy="hypergraph", block_size=64)
    stats, node = a_plan.stats, a_plan.cluster.node_of_rank
    row_bytes = {0: 8 * 16 * 2, 1: 2 * 2 * 16 * 2, 2: 8 * 16 * 2 + 8 * 4, 3: 0}
    inter = intra = 0
    received = np.zeros(4)
    for rank in range(4):
        program = a_plan.rank_plan(rank).mask_program()
        for peer, buffer, rows in program.sends[:, [Move.PEER, Move.BUFFER, Move.ROWS]].tolist():
            volume = rows * row_bytes[buffer]
            received[peer] += volume
            inter, intra = (
                (inter + volume, intra) if node[rank] != node[peer] else (inter, intra + volume)
            )
    assert (inter, intra) == (stats.inter_node_bytes, stats.intra_node_bytes)
    assert received.max() == stats.max_rank_recv_bytes
    tokens = [len(a_plan.token_indices(r)) for r in range(4)]
    assert stats.token_balance == pytest.approx(max(tokens) / np.mean(tokens))


def test_positions_and_layout():
    a_plan = small_plan(strategy="hypergraph", block_size=50)
    starts = np.repeat(np.cumsum(a_plan.seqlens) - a_plan.seqlens, a_plan.seqlens)
    for rank in range(4):
        indices = a_plan.token_indices(rank)
        assert (a_plan.positions(rank) == indices - starts[indices]).all()
        local = a_plan.rank_plan(rank)
        assert (local.token_indices == indices).all()
        assert (local.positions == a_plan.positions(rank)).all()
    values = np.random.default_rng(0).random((a_plan.num_tokens, 3))
    assert (a_plan.unshard([a_plan.shard(r, values) for r in range(4)]) == values).all()
    with pytest.raises(ValueError, match="rank 4 is not one of the plan's 4"):
        a_plan.token_indices(4)
    with pytest.raises(ValueError, match="tensor has 3 rows"):
        a_plan.shard(0, values[:3])


def test_the_same_seed_gives_the_same_plan():
    one, two = small_plan(strategy="hypergraph"), small_plan(strategy="hypergraph")
    for rank in range(4):
        a, b = one.rank_plan(rank), two.rank_plan(rank)
        assert (a.token_indices == b.token_indices).all()
        assert (a.mask_program().items == b.mask_program().items).all()


def test_plans_survive_a_file_and_nothing_else_is_read(tmp_path):
    a_plan = small_plan()
    path = tmp_path / "plan.dcp"
    a_plan.save(path)
    back = Plan.load(path)
    assert back.stats == a_plan.stats
    assert back == a_plan
    assert RankPlan.from_bytes(a_plan.rank_plan(2).to_bytes()) == a_plan.rank_plan(2)
    assert back.rank_plan(2).to_bytes() == a_plan.rank_plan(2).to_bytes()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:30] + b"x" + whole[31:], b"PK" + whole[2:], b"", whole[:20]):
        with pytest.raises(WireError):
            Plan.from_bytes(damaged)
    with pytest.raises(WireError, match="expected a dcp plan, got a rank-plan"):
        Plan.from_bytes(a_plan.rank_plan(0).to_bytes())


def test_plans_are_values():
    one, again, other = small_plan(seed=0), small_plan(seed=0), small_plan(strategy="zigzag")
    assert one == again, "planned in another time"
    assert one != other
    assert one.rank_plan(1) == again.rank_plan(1)
    assert one.rank_plan(1) != other.rank_plan(1)
    assert one.rank_plan(1) != one.rank_plan(0)
    assert one.stats == one.rank_plan(3).stats
    assert one != "a plan"


def test_the_arrays_of_plans_are_read_only():
    a_plan = small_plan()
    rank_plan = RankPlan.from_bytes(a_plan.rank_plan(0).to_bytes())
    for array in (
        a_plan.owner, a_plan.seqlens, a_plan.masks["default"].items,
        rank_plan.block_offset, rank_plan.mask_program().slices,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


def test_a_message_is_not_unpacked_beyond_what_it_announces(monkeypatch):
    message = pack("thing", {"a": 1}, {"x": np.arange(10), "y": np.zeros(3)})
    meta, arrays = unpack("thing", message)
    assert meta == {"a": 1}
    assert arrays["x"].tolist() == list(range(10))
    monkeypatch.setattr(wire, "MOST_BYTES", 10 + 3 * 8 - 1)
    with pytest.raises(WireError, match="thing of 34 bytes: more than 33 are not read"):
        unpack("thing", message)
    with pytest.raises(ValueError, match="34 bytes is beyond 33"):
        pack("thing", {}, arrays)
    monkeypatch.undo()
    bomb, announced = wire.zlib.compress(bytes(1 << 24)), [["x", "|i1", [100]]]
    monkeypatch.setattr(wire.zlib, "compress", lambda *_, **__: bomb)
    monkeypatch.setattr(
        wire.json, "dumps", lambda *_, **__: f'{{"meta":0,"arrays":{announced}}}'.replace("'", '"')
    )
    with pytest.raises(WireError, match="not the 100 bytes announced"):
        unpack("thing", pack("thing", {}, {}))


def test_a_rank_program_is_kilobytes():
    batch = SequenceBatch([65536, 20000, 15000, 12000, 8000, 6000, 4000, 572], "causal")
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    a_plan = plan(batch, spec, Cluster(num_nodes=4, devices_per_node=8))
    assert max(len(a_plan.rank_plan(rank).to_bytes()) for rank in range(32)) < 100_000


def test_no_division_is_a_dump():
    """No division holds more than 1.5 times its fair share of a rank's compute."""
    batch = SequenceBatch([40000, 9000, 5000, 4000, 3000, 2000], "causal")
    spec = AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=128)
    a_plan = plan(
        batch, spec, Cluster(num_nodes=2, devices_per_node=4), strategy="hypergraph",
        num_divisions=4, block_size=512,
    )  # fmt: skip
    tables = a_plan.masks["default"]
    assert tables.num_divisions == 4
    for rank in range(8):
        items = tables.items[tables.items[:, Item.RANK] == rank]
        area_of_tile = tables.tile_area[items[:, Item.TILE]]
        area = np.bincount(items[:, Item.STEP], weights=area_of_tile, minlength=4)
        own = items[:, [Item.Q_ROW, Item.KV_ROW]] < a_plan.rank_tokens[rank]
        local = own.all(axis=1)
        if local.any() and (~local).any():
            assert area[1:].max() <= 1.5 * area.sum() / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "magic"}, "strategy 'magic' is not one of auto, "),
        ({"block_size": 0}, "block_size must be 1 or more, got 0; or give 'auto'"),
        ({"num_divisions": 0}, "num_divisions must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        small_plan(**options)


def test_wrong_batches_and_specs_are_named():
    with pytest.raises(ValueError, match=r"seqlens\[1\] must be 0 or more, got -4"):
        SequenceBatch([3, -4])
    with pytest.raises(ValueError, match="mask 'default' of sequence 0 is 4 x 4, the sequence has"):
        SequenceBatch([5], [AttnMask.causal(4)])
    with pytest.raises(ValueError, match="num_kv_heads=3 does not divide num_heads=8"):
        AttentionSpec(num_heads=8, num_kv_heads=3, head_dim=16)
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=16, dtype="int8")
    with pytest.raises(ValueError, match="mask 'wavy' is not one of"):
        SequenceBatch([5], "wavy")
    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8)
    with pytest.raises(ValueError, match=r"the batch is a list: give a dcp\.SequenceBatch"):
        plan([100], spec, Cluster())


def test_a_spec_takes_what_torch_calls_a_dtype():
    class Dtype:
        def __str__(self):
            return "torch.float16"

    spec = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8, dtype=Dtype())
    assert spec.dtype == "float16"
    assert spec == AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=8, dtype="float16")
    assert spec.dtype_bytes == 2


def test_one_sequence_takes_its_mask_without_a_list():
    mask = AttnMask.sliding_window(50, 7)
    assert SequenceBatch([50], mask).masks == {"default": [mask]}
    assert SequenceBatch([50], {"a": mask, "b": "full"}).masks["a"] == [mask]
