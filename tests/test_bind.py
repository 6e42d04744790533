"""Attention that backward repeats runs under the plan of its forward pass, or is refused."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dcp import AttentionExecutor, AttentionSpec, Cluster, LocalWorld, SequenceBatch, plan
from dcp.runtime import regions

SPEC = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, dtype="float64")
SEQLENS = [5, 11]  # of both plans: a wrong one is not noticed by its shapes
WAYS = ("reentrant", "not reentrant", "nested", "reentrant in the other", "a function's own")


def make_plan(mask, world=1):
    return plan(SequenceBatch(SEQLENS, mask), SPEC, Cluster(devices_per_node=world))


PLANS = [make_plan("causal"), make_plan("full"), make_plan("sliding_window:window=2")]


class OwnCheckpoint(torch.autograd.Function):
    """As Megatron and DeepSpeed write it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def repeated(way, run, x):
    """``run(x)``, again in backward."""
    match way:
        case "reentrant" | "not reentrant":
            return checkpoint(run, x, use_reentrant=way == "reentrant")
        case "nested":
            inner = lambda x: checkpoint(run, x, use_reentrant=False)  # noqa: E731
            return checkpoint(inner, x, use_reentrant=False)
        case "reentrant in the other":
            inner = lambda x: checkpoint(run, x, use_reentrant=True)  # noqa: E731
            return checkpoint(inner, x, use_reentrant=False)
        case "a function's own":
            return OwnCheckpoint.apply(run, x)
    return run(x)


class Model(torch.nn.Module):
    """Two layers of attention and a nonlinearity, each repeated in backward in a given way."""

    def __init__(self, way=None):
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 16) for _ in range(2)).double()

    def layer(self, linear, x, attend):
        q, kv = linear(x).unflatten(1, (4, 4)).split([2, 2], dim=1)
        return torch.tanh(attend(q, kv.unsqueeze(2)).flatten(1)) + x

    def forward(self, x, attend):
        for linear in self.layers:
            x = repeated(self.way, lambda x, linear=linear: self.layer(linear, x, attend), x)
        return x.square().sum()


def gradients(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def inputs(number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(sum(SEQLENS), 8, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def local(number):
    """The same in the order of a rank that has them all."""
    return PLANS[number].shard(0, inputs(number).detach()).requires_grad_()


def backward(model, loss):
    """Gradients by ``backward``, which reentrant checkpointing asks for."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def wanted():
    """The gradients of each plan's batch, without an executor and without checkpointing."""
    model = Model()
    worlds = [LocalWorld(a_plan, kernel="dense") for a_plan in PLANS]
    attends = [lambda q, kv, w=w: w.attention(q, *kv.unbind(1)) for w in worlds]
    return [backward(model, model(inputs(i), attend)) for i, attend in enumerate(attends)]


def assert_equal(found, want):
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("way", [None, *WAYS])
def test_the_next_plans_may_be_prepared_before_backward(wanted, way, bound):
    """Each order of the passes of three batches: one after another, one ahead, 1F1B, last first."""
    for order in ("f0 b0 f1 b1 f2 b2", "f0 p1 b0 f1 p2 b1 f2 b2", "f0 f1 b0 f2 b1 b2",
                  "f0 f1 f2 b2 b1 b0"):  # fmt: skip
        executor, model, losses = AttentionExecutor(), Model(way), {}
        for step in order.split():
            number = int(step[1])
            if step[0] == "b":
                assert_equal(backward(model, losses.pop(number)), wanted[number])
                continue
            one = executor.bind(PLANS[number]) if bound else executor
            executor.prepare(PLANS[0 if bound else number])
            if step[0] == "f":
                losses[number] = model(local(number), one.attention)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_evaluation_between_the_passes_and_both_losses_at_once(wanted, way):
    executor, model = AttentionExecutor(), Model(way)
    losses = []
    for number in (0, 1):
        executor.prepare(PLANS[number])
        losses.append(model(local(number), executor.attention))
        executor.prepare(PLANS[2])
        with torch.no_grad():
            model(local(2), executor.attention)
    assert_equal(backward(model, sum(losses)), wanted[0] + wanted[1])


@pytest.mark.parametrize("way", ["reentrant", "not reentrant"])
def test_all_ranks_in_one_process(wanted, way):
    model = Model(way)
    worlds = [LocalWorld(make_plan(mask, 2)) for mask in ("causal", "full")]
    losses = [model(inputs(i), lambda q, kv, w=w: w.attention(q, *kv.unbind(1))) for i, w in enumerate(worlds)]  # fmt: skip  # noqa: E501
    for loss, want in zip(losses, wanted, strict=False):
        assert_equal(backward(model, loss), want)


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("bound", [False, True])
def test_compiled_code_repeats_its_own_plan(wanted, bound, where):
    executor, model = AttentionExecutor(), Model("not reentrant" if where == "inside" else None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=where == "inside")
    losses = []
    for number in range(3):
        one = executor.bind(PLANS[number]) if bound else executor
        executor.prepare(PLANS[0 if bound else number])
        run = lambda x, one=one: compiled(x, one.attention)  # noqa: E731
        x = local(number)
        losses.append(run(x) if where == "inside" else checkpoint(run, x, use_reentrant=False))
    for number in range(3):
        assert_equal(gradients(model, losses[number]), wanted[number])


def test_what_cannot_be_told_is_refused(monkeypatch):
    """A region that is not recognised, and one whose calls had several plans."""
    executor, model = AttentionExecutor(), Model("not reentrant")
    line = r"cannot be told which of the executor's plans is meant: give the model executor\.bind"

    def both(x):
        for a_plan in PLANS[:2]:
            executor.prepare(a_plan)
            x = model.layer(model.layers[0], x, executor.attention)
        return x.sum()

    loss = checkpoint(both, inputs(0), use_reentrant=False)
    with pytest.raises(ValueError, match=line):
        loss.backward()

    monkeypatch.setattr(regions, "_regions", list)
    for prepared, raises in ((PLANS[:1], False), (PLANS[:2], True)):
        executor = AttentionExecutor()
        executor.prepare(prepared[0])
        loss = model(inputs(0), executor.attention)
        executor.prepare(executor.bind(prepared[-1]) if raises else executor.bind(PLANS[0]))
        with pytest.raises(ValueError, match=line):
            loss.backward()


def test_the_plan_of_a_repeated_call_is_the_executors_plan():
    """Models ask it for the number of local tokens."""
    executor, model, seen = AttentionExecutor(), Model("not reentrant"), []

    def attend(q, kv):
        seen.append(executor.plan)
        return executor.attention(q, kv)

    executor.prepare(PLANS[0])
    first, loss = executor.plan, model(inputs(0), attend)
    executor.prepare(PLANS[1])
    loss.backward()
    assert seen == [first] * 4
    assert executor.plan is not first


def test_a_bound_plan_is_kept_as_long_as_it_is_held_and_no_longer():
    executor = AttentionExecutor()
    bound = executor.bind(PLANS[0])
    assert bound.plan.num_local_tokens == sum(SEQLENS)
    prepared = weakref.ref(bound.prepared)
    for _ in range(regions.KEPT_PLANS):
        executor.bind(PLANS[1])
    assert executor.bound(bound.ticket).prepared is bound.prepared
    ticket = bound.ticket
    del bound
    gc.collect()
    assert prepared() is None
    with pytest.raises(ValueError, match=r"is gone before its backward pass.* at most 64 plans"):
        executor.bound(ticket)
