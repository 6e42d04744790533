"""Values of another width than queries and keys, as in DeepSeek's latent attention."""

import json

import pytest
import torch

from dcp import AttentionSpec, AttnMask, Cluster, LocalWorld, SequenceBatch, plan
from dcp.cli import main
from dcp.cost import attention_seconds
from dcp.runtime import AttentionExecutor
from dcp.runtime.communicator import LocalCommunicator
from tests.oracle import batch_mask, dense_attention

SEQLENS = [1, 0, 7, 70, 33]
MASKS = [AttnMask.streaming(n, sink=3, window=21) for n in SEQLENS]
SHAPES = {"mla": (4, 4, 24, 16), "gqa": (4, 2, 24, 16), "wide_values": (4, 1, 8, 40)}


def make_spec(shape="gqa", dtype="float32"):
    heads, kv_heads, head_dim, value_dim = SHAPES[shape]
    return AttentionSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype
    )


def make_plan(spec, world=4, strategy="hypergraph", **options):
    nodes = 2 if world % 2 == 0 else 1
    cluster = Cluster(num_nodes=nodes, devices_per_node=world // nodes)
    options = {"block_size": 24} | options
    return plan(SequenceBatch(SEQLENS, MASKS), spec, cluster, strategy=strategy, **options)


def inputs(spec, dtype, *, sink=False):
    """q, k, v, the output's gradient, and a sink or None."""
    made = torch.Generator().manual_seed(0)
    tokens, heads, kv_heads = sum(SEQLENS), spec.num_heads, spec.num_kv_heads
    shapes = (
        (tokens, heads, spec.head_dim),
        (tokens, kv_heads, spec.head_dim),
        (tokens, kv_heads, spec.value_dim),
        (tokens, heads, spec.value_dim),
    )
    tensors = [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]
    sinks = torch.randn(heads, generator=made, dtype=torch.float64).to(dtype)
    return [*tensors, sinks if sink else None]


def results(attention, q, k, v, grad_out, sink):
    """out, lse, dq, dk, dv, and dsink where there is one."""
    wanted = [x.detach().requires_grad_() for x in (q, k, v, sink) if x is not None]
    out, lse = attention(*wanted[:3], sink=None if sink is None else wanted[3])
    return [x.detach() for x in (out, lse, *torch.autograd.grad(out, wanted, grad_out))]


def by_the_book(spec, dtype, *, sink=False, **call):
    """The results in float64 of tensors rounded to ``dtype``, and dense attention's in it."""
    mask = batch_mask(SequenceBatch(SEQLENS, MASKS))

    def dense(q, k, v, sink):
        return dense_attention(q, k, v, mask, sink=sink, **call)

    tensors = inputs(spec, dtype, sink=sink)
    exact = [None if x is None else x.double() for x in tensors]
    return results(dense, *exact), results(dense, *tensors)


def planned(a_plan, dtype, kernel="auto", *, sink=False, **call):
    def attention(q, k, v, sink):
        world = LocalWorld(a_plan, kernel=kernel)
        return world.attention(q, k, v, sink=sink, return_lse=True, **call)

    return results(attention, *inputs(a_plan.spec, dtype, sink=sink))


def gaps(found, want):
    return [
        torch.nan_to_num(a.double() - b, nan=0, posinf=0, neginf=0).abs().max().item()
        if torch.equal(a.isinf(), b.isinf()) and not a.isnan().any()
        else float("inf")
        for a, b in zip(found, want, strict=True)
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", ["hypergraph", "zigzag", "usp", "allgather", "data_parallel"])
def test_every_width_equals_dense(strategy, shape, dtype, tolerance):
    spec = make_spec(shape)
    want, _ = by_the_book(spec, dtype)
    assert max(gaps(planned(make_plan(spec, strategy=strategy), dtype), want)) <= tolerance


def test_head_groups_of_ulysses_equal_dense():
    spec = make_spec("mla", "float64")
    a_plan = make_plan(spec, 4, "ulysses")
    assert a_plan.num_head_groups > 1
    want, _ = by_the_book(spec, torch.float64)
    assert max(gaps(planned(a_plan, torch.float64), want)) <= 1e-10


@pytest.mark.parametrize(
    ("kernel", "call"),
    [
        ("torch_cpu", {"sink": True, "scale": 0.3}),
        ("dense", {"sink": True, "softcap": 2.0}),
    ],
)
def test_options_of_every_kernel(kernel, call):
    spec = make_spec()
    want, _ = by_the_book(spec, torch.float64, **call)
    found = planned(make_plan(spec, 3), torch.float64, kernel, **call)
    assert max(gaps(found, want)) <= 1e-10


def test_flex_serves_other_widths():
    spec = make_spec("mla")
    q, k, v, *_ = inputs(spec, torch.float32)
    want, _ = by_the_book(spec, torch.float32)
    out = LocalWorld(make_plan(spec, 2), kernel="flex").attention(q, k, v)
    assert (out - want[0]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_dense(dtype):
    spec = make_spec("mla", str(dtype).removeprefix("torch."))
    want, dense = by_the_book(spec, dtype)
    ours, theirs = gaps(planned(make_plan(spec), dtype), want), gaps(dense, want)
    assert all(our <= 2 * their for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


def run_rank(messages):
    """On each rank of a gloo group: keys and values as a pair; out, dq, dk, dv."""
    from dcp.program import RankPlan

    executor = AttentionExecutor()
    rank_plan = RankPlan.from_bytes(messages[executor.rank])
    executor.prepare(rank_plan)
    mine = torch.from_numpy(rank_plan.token_indices)
    *tensors, grad_out, _ = inputs(rank_plan.spec, torch.float64)
    q, k, v = (x[mine].requires_grad_() for x in tensors)
    out = executor.attention(q, (k, v))
    grads = torch.autograd.grad(out, (q, k, v), grad_out[mine])
    return [x.detach().numpy() for x in (out, *grads)]


def test_processes_equal_dense(gloo_pool):
    spec = make_spec("mla", "float64")
    a_plan = make_plan(spec, 3, "zigzag")
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(3)]
    shards = gloo_pool(3).run(run_rank, messages)
    found = [a_plan.unshard([torch.from_numpy(s[i]) for s in shards]) for i in range(4)]
    want, _ = by_the_book(spec, torch.float64)
    assert max(gaps(found, [want[0], *want[2:]])) <= 1e-10


# --------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("shape", ["gqa", "equal"])
def test_a_pair_is_the_packed_tensor(shape):
    spec = make_spec() if shape == "gqa" else make_spec_of_equal_widths()
    executor = AttentionExecutor()
    executor.prepare(make_plan(spec, 1))
    q, k, v, *_ = inputs(spec, torch.float32)
    packed = torch.cat([k, v], -1) if shape == "gqa" else torch.stack([k, v], 1)
    assert torch.equal(executor.attention(q, (k, v)), executor.attention(q, packed))


def make_spec_of_equal_widths():
    return AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")


def test_compiled_code_knows_the_width_of_the_output():
    spec, executor = make_spec(), AttentionExecutor()
    executor.prepare(make_plan(spec, 1))
    q, k, v, grad_out, _ = inputs(spec, torch.float32)
    q.requires_grad_()

    def run(q, k, v):
        return (executor.attention(q, (k, v)) * grad_out).sum()

    found = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(torch.autograd.grad(found, q), torch.autograd.grad(run(q, k, v), q))


def test_other_shapes_are_refused():
    spec, executor = make_spec(), AttentionExecutor()
    executor.prepare(make_plan(spec, 1))
    q, k, v, *_ = inputs(spec, torch.float32)
    with pytest.raises(
        ValueError, match=r"kv has shape \(111, 2, 2, 24\), the plan needs \(111, 2, 40\)"
    ):
        executor.attention(q, (k, k))
    with pytest.raises(ValueError, match="only their last dimension may differ"):
        executor.attention(q, (k, v[:, :1]))
    with pytest.raises(ValueError, match="value_dim must be 1 or more, got 0"):
        AttentionSpec(num_heads=4, num_kv_heads=4, head_dim=24, value_dim=0)


# --------------------------------------------------------------------------- figures


def test_equal_widths_are_the_default():
    assert make_spec_of_equal_widths() == AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, dtype="float32"
    )


def test_bytes_and_seconds_count_both_widths():
    spec = make_spec("gqa", "bfloat16")
    assert spec.q_token_bytes == 4 * 24 * 2
    assert spec.kv_token_bytes == 2 * (24 + 16) * 2
    assert spec.out_token_bytes == 4 * (16 * 2 + 4)
    cluster = Cluster(devices_per_node=1)
    forward, backward = (attention_seconds(1, spec, cluster, backward=b) for b in (False, True))
    assert forward * cluster.device_flops == pytest.approx(2 * 4 * (24 + 16))
    products = (
        cluster.backward_ratio * 2 / 5
    )  # the measured ratio is for five products of one width
    assert backward * cluster.device_flops == pytest.approx(2 * 4 * products * (3 * 24 + 2 * 16))


@pytest.mark.parametrize("strategy", ["hypergraph", "zigzag"])
def test_only_the_planned_bytes_travel_in_either_pass(monkeypatch, strategy):
    """Half precision: gradients that hop in a ring are counted, and sent, in float32."""
    spec = make_spec("gqa", "bfloat16")
    a_plan = make_plan(spec, 3, strategy)
    assert a_plan.masks["default"].gradients_hop == (strategy == "zigzag")
    sent, launch = [], LocalCommunicator.launch

    def counting(self, sends, receives):
        sent.append(sum(message.numel() for message in sends.values()))
        return launch(self, sends, receives)

    monkeypatch.setattr(LocalCommunicator, "launch", counting)
    planned(a_plan, torch.bfloat16)
    both = sum(a_plan.moved_bytes("default", backward=b).sum() for b in (False, True))
    assert sum(sent) == both


def test_plan_takes_the_width_of_values(capsys):
    shape = "--seqlens 4096 --heads 4 --head-dim 192 --devices-per-node 4 --strategy zigzag --json"
    rows = []
    for width in ("", "--value-dim 128"):
        main(["plan", *shape.split(), *width.split()])
        rows.append(json.loads(capsys.readouterr().out))
    wide, narrow = (row["intra_node_bytes"] for row in rows)
    assert narrow / wide == pytest.approx((192 + 128) / (192 + 192))
