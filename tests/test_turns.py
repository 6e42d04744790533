"""Half-batches that take turns: equal to dense attention, in any order of the halves' parts."""

import numpy as np
import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan
from dcp.halves import halves, plan_halves
from dcp.runtime.turns import Turn
from tests.oracle import batch_mask, dense_attention, random_qkv

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float64")
SEQLENS = [700, 40, 7, 129, 260, 33, 1]
WIDTH = SPEC.num_heads * SPEC.head_dim


def layers(rows, attend):
    """Two layers whose linear parts are a product each; ``attend`` yields at its turns, and returns
    the attention of q and kv."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        weight = torch.randn(WIDTH, 3 * WIDTH, dtype=rows.dtype, generator=generator) * 0.1
        q, k, v = (rows @ weight).chunk(3, dim=1)
        q = q.unflatten(1, (SPEC.num_heads, SPEC.head_dim))
        kv = torch.stack([x.unflatten(1, (4, 16))[:, :2] for x in (k, v)], dim=1)
        out = yield from attend(q, kv)
        rows = rows + out.flatten(1)
    return rows


def by_turns(bound, sink):
    def attend(q, kv):
        turn = Turn(bound, q, kv, sink=sink)
        yield
        turn.compute()
        yield
        return turn.result()

    return attend


def in_turns(parts):
    """Drive the halves' layers alternately, as a training loop would."""
    waiting, results = list(parts), {}
    while waiting:
        for part in list(waiting):
            try:
                next(part)
            except StopIteration as end:
                results[id(part)] = end.value
                waiting.remove(part)
    return [results[id(part)] for part in parts]


def run_rank(messages, inputs, with_sink):
    """This rank's rows after two layers, and their gradients, half by half."""
    from dcp.program import RankPlan

    executor = AttentionExecutor()
    sink = torch.linspace(-1, 1, SPEC.num_heads, dtype=torch.float64, requires_grad=True)
    sink = sink if with_sink else None
    plans = [RankPlan.from_bytes(message[executor.rank]) for message in messages]
    mine = [
        torch.from_numpy(x)[torch.from_numpy(p.token_indices)].requires_grad_()
        for x, p in zip(inputs, plans, strict=True)
    ]
    outs = in_turns(
        [layers(x, by_turns(executor.bind(p), sink)) for x, p in zip(mine, plans, strict=True)]
    )
    sum(out.square().sum() for out in outs).backward()
    grads = [x.grad.numpy() for x in mine]
    return [out.detach().numpy() for out in outs], grads, sink is not None and sink.grad.numpy()


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("mask", ["causal", "streaming"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_turns_equal_dense_attention(gloo_pool, world, mask, with_sink):
    batch = SequenceBatch(SEQLENS, mask)
    cluster = Cluster(num_nodes=2 if world == 4 else 1, devices_per_node=world if world < 4 else 2)
    parts = plan_halves(batch, SPEC, cluster, block_size=64)
    assert sorted(np.concatenate([chosen for chosen, _ in parts]).tolist()) == [*range(7)]
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((made.num_tokens, WIDTH)) for _, made in parts]
    messages = [[made.rank_plan(r).to_bytes() for r in range(world)] for _, made in parts]
    found = gloo_pool(world).run(run_rank, messages, inputs, with_sink)
    sink = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True) if with_sink else None
    for half, (chosen, made) in enumerate(parts):
        dense = batch_mask(batch.reordered(chosen))
        x = torch.from_numpy(inputs[half]).requires_grad_()

        def attend(q, kv, dense=dense):
            k, v = kv.unbind(1)
            out, lse = dense_attention(q, k, v, dense)
            if sink is not None:
                out = out * torch.exp(lse - torch.logaddexp(lse, sink))[..., None]
            yield
            return out

        [want] = in_turns([layers(x, attend)])
        want.square().sum().backward()
        for index, wanted in ((0, want), (1, x.grad)):
            rows = made.unshard([torch.from_numpy(of[index][half]) for of in found])
            assert (rows - wanted).abs().max() <= 1e-9
    if with_sink:
        assert np.abs(sum(of[2] for of in found) - sink.grad.numpy()).max() <= 1e-8


def test_parts_out_of_turn_are_refused():
    executor = AttentionExecutor()
    made = plan(SequenceBatch([30]), SPEC, Cluster(devices_per_node=1))
    q, k, v = random_qkv(30, SPEC, torch.float64)
    kv = torch.stack([k, v], dim=1)
    turn = Turn(executor.bind(made), q, kv)
    with pytest.raises(ValueError, match=r"result\(\) is out of turn.*it has begun"):
        turn.result()
    turn.compute()
    with pytest.raises(ValueError, match=r"compute\(\) is out of turn.*it has been computed"):
        turn.compute()
    assert turn.result().shape == q.shape
    with pytest.raises(ValueError, match=r"result\(\) is out of turn.*it is over"):
        turn.result()
    with pytest.raises(ValueError, match=r"got a AttentionExecutor: give executor\.bind\(plan\)"):
        Turn(executor, q, kv)
    with pytest.raises(ValueError, match="q has shape"):
        Turn(executor.bind(made), q[:-1], kv)


def test_halves_are_even_and_nothing_is_lost():
    rng = np.random.default_rng(1)
    for _ in range(50):
        seconds = rng.lognormal(0, 1.5, rng.integers(2, 40))
        one, two = halves(seconds)
        assert sorted([*one, *two]) == [*range(len(seconds))]
        longest = seconds.max()
        assert abs(seconds[one].sum() - seconds[two].sum()) <= longest
    assert [part.tolist() for part in halves(np.array([3.0]))] == [[0]]
