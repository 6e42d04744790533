"""Learning a cluster's rates from what ranks measured: the measurements here are simulated ones."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import dcp
from dcp.data.learning import Learning
from dcp.rates import PassFigures, RateFit
from dcp.simulate import simulate

SPEC = dcp.AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
TRUE = dcp.Cluster(
    num_nodes=2,
    devices_per_node=2,
    inter_node_bandwidth=2e9,
    device_network_bandwidth=2e9,
    intra_node_bandwidth=2e10,
    linear_flops=2e14,
    memory_bandwidth=1e13,
)


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        dcp.SequenceBatch(rng.integers(200, 9000, size=4).tolist(), "causal") for _ in range(count)
    ]


def measured(plan, cluster, speeds=None, noise=None):
    """Figures of every rank, as if the plan had run on ``cluster`` in no one's way."""
    timeline = simulate(plan, cluster)
    speeds = speeds or [1.0] * plan.num_ranks
    figures = {rank: [] for rank in range(plan.num_ranks)}
    for backward, passes in ((False, timeline.forward), (True, timeline.backward)):
        for mask, played in passes.items():
            for rank, of_rank in figures.items():
                factor = 1.0 if noise is None else float(np.exp(noise.normal(0, 0.1)))
                took = played.computed - played.begin
                steps = [
                    (
                        float(step + 1),
                        float(played.arrived[step, rank] - played.begin[step, rank]),
                        float(played.arrived[step, rank] - played.computed[step, rank]),
                    )
                    for step in range(len(took))
                    if played.arrived[step, rank] > played.begin[step, rank]
                ]
                tokens = plan.rank_tokens[rank]
                linear = dcp.cost.linear_seconds(tokens, SPEC, cluster, model_width=1024)
                of_rank.append(
                    PassFigures(
                        fingerprint=plan.fingerprint,
                        mask=mask,
                        backward=backward,
                        num_passes=2,
                        seconds=played.seconds,
                        attention_seconds=float(took[:, rank].sum()) * factor / speeds[rank],
                        packing_seconds=0.0,
                        between_seconds=linear * (2 if backward else 1) / 3,
                        transfers=tuple(steps),
                    )
                )
    return figures


def learn(fit, plans, **options):
    for plan in plans:
        ranks = [plan.rank_plan(rank) for rank in range(plan.num_ranks)]
        fit.observe(ranks, measured(plan, TRUE, **options))


@pytest.fixture(scope="module")
def plans():
    """Of several rules, so that links, launches and arithmetic are told apart."""
    rules = ["zigzag", "bisection", "data_parallel", "a2a_p2p"]
    return [
        dcp.plan(batch, SPEC, TRUE, strategy=rules[i % len(rules)], block_size=512)
        for i, batch in enumerate(batches(16))
    ]


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_rates_that_are_wrong_by_a_factor_are_found(plans, factor):
    given = replace(
        TRUE,
        device_flops=TRUE.device_flops * factor,
        inter_node_bandwidth=TRUE.inter_node_bandwidth * factor,
        device_network_bandwidth=TRUE.device_network_bandwidth * factor,
        linear_flops=TRUE.linear_flops / factor,
    )
    fit = RateFit(given, model_width=1024)
    learn(fit, plans)
    for name in ("device_flops", "linear_flops"):
        assert getattr(fit.cluster, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name
    for name in ("inter_node_bandwidth", "device_network_bandwidth"):
        assert getattr(fit.cluster, name) == pytest.approx(getattr(TRUE, name), rel=0.25), name
    assert fit.cluster.backward_ratio == pytest.approx(TRUE.backward_ratio, rel=0.05)
    assert fit.error < 0.1
    assert fit.cluster.rank_speeds == ()


def test_right_rates_stay_where_they_are_though_some_measurements_are_disturbed(plans):
    fit = RateFit(TRUE, model_width=1024)
    learn(fit, plans, noise=np.random.default_rng(0))
    assert fit.cluster.device_flops == pytest.approx(TRUE.device_flops, rel=0.05)
    disturbed = plans[0]
    ranks = [disturbed.rank_plan(rank) for rank in range(4)]
    figures = measured(disturbed, TRUE)
    for of_rank in figures.values():
        of_rank[:] = [
            replace(each, attention_seconds=each.attention_seconds * 20) for each in of_rank
        ]
    fit.observe(ranks, figures)
    assert fit.cluster.device_flops == pytest.approx(TRUE.device_flops, rel=0.08)


def test_a_slow_rank_is_found_and_noise_is_not_taken_for_one(plans):
    fit = RateFit(TRUE, model_width=1024)
    learn(fit, plans, speeds=[1.0, 1.0, 1 / 1.5, 1.0])
    assert fit.cluster.rank_speeds == pytest.approx((1, 1, 1 / 1.5, 1), rel=0.05)
    fit = RateFit(TRUE, model_width=1024)
    learn(fit, plans, noise=np.random.default_rng(1))
    speeds = fit.cluster.rank_speeds or (1.0,)
    assert speeds == pytest.approx((1.0,) * len(speeds), rel=0.08)


def test_a_fit_goes_on_from_its_state(plans):
    fit, again = RateFit(TRUE, model_width=1024), RateFit(TRUE, model_width=1024)
    learn(fit, plans[:6], speeds=[1.0, 1.0, 1 / 1.5, 1.0])
    again.load_state_dict(json.loads(json.dumps(fit.state_dict())))
    for name, value in vars(fit.cluster).items():
        if not isinstance(value, str | None):
            assert getattr(again.cluster, name) == pytest.approx(value, rel=1e-3), name
    smaller = RateFit(replace(TRUE, num_nodes=1), model_width=1024)
    smaller.load_state_dict(fit.state_dict())
    assert smaller.cluster.rank_speeds == ()
    assert smaller.cluster.device_flops == pytest.approx(fit.cluster.device_flops, rel=1e-3)


def test_figures_of_another_plan_teach_nothing(plans):
    fit = RateFit(TRUE)
    ranks = [plans[0].rank_plan(rank) for rank in range(4)]
    fit.observe(ranks, measured(plans[1], TRUE))
    assert fit.cluster.device_flops == TRUE.device_flops
    assert fit.error == float("inf")


def test_two_messages_tell_a_links_latency_from_its_bandwidth():
    fit = RateFit(replace(TRUE, inter_node_bandwidth=6e9))
    fit.probe(far=[(size, 1e-4 + size / 5e8) for size in (1 << 10, 1 << 20)], near=[])
    assert fit.cluster.device_network_bandwidth == pytest.approx(5e8)
    assert fit.cluster.inter_node_bandwidth == pytest.approx(15e8)
    assert fit.cluster.inter_node_latency == pytest.approx(1e-4, rel=0.03)
    assert fit.cluster.intra_node_bandwidth == TRUE.intra_node_bandwidth


# --------------------------------------------------------------------------- time to plan


@pytest.mark.parametrize(
    ("step", "workers", "budget"),
    [(0.3, 1, None), (1.1, 1, 0.5), (1.1, 2, 1.0), (60.0, 4, 2.0), (60.0, 0, None)],
)
def test_plans_take_half_of_the_time_that_steps_leave(monkeypatch, step, workers, budget):
    cluster = dcp.Cluster.preset("h100")
    executor = SimpleNamespace(group=None)
    exchange = SimpleNamespace(num_ranks=1)
    learning = Learning(executor, exchange, cluster, model_width=None, spare_workers=workers)
    clock = iter([0.0, 500.0, *(500.0 + step * n for n in range(1, 9))])
    monkeypatch.setattr("dcp.data.learning.perf_counter", lambda: next(clock))
    monkeypatch.setattr(learning, "_hand_in", lambda: None)
    monkeypatch.setattr(learning, "_collect", lambda: None)
    assert learning.options() == {}
    for _ in range(10):
        learning.turn()
    assert learning.time_budget == budget
    assert learning.options() == ({} if budget is None else {"time_budget": budget})


# --------------------------------------------------------------------------- real ranks


def learn_on_a_rank(rounds):
    """A loader whose rates are wrong by 50, an executor, two layers a batch; what was learnt."""
    spec = dcp.AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=32, dtype="float32")
    ranks = dist.get_world_size()
    wrong = replace(dcp.Cluster.preset("laptop", devices_per_node=ranks), device_flops=5e12)
    documents = [np.arange(length) for length in (700, 500, 300, 200, 150, 150) * 14]
    executor = dcp.AttentionExecutor()
    with dcp.DCPDataLoader(
        documents, spec=spec, tokens_per_batch=2000, cluster=wrong, num_workers=0, look_ahead=1,
        plan_options={"model_width": 0}, group=dist.group.WORLD,
    ) as loader:  # fmt: skip
        loader.learn_from(executor)
        ratios, batches = [], iter(loader)
        for _ in range(rounds):
            batch, plan = next(batches)
            executor.prepare(plan)
            rows = torch.randn(len(batch.tokens), 4, 32, requires_grad=True)
            for _ in range(2):
                rows = executor.attention(rows, torch.randn(len(rows), 2, 2, 32))
            rows.sum().backward()
            ratios.append(loader.predicted_over_measured)
        state = json.loads(json.dumps(loader.state_dict()))
        learnt = loader.rates and loader.rates.cluster
        loader.load_state_dict(state)
        again = loader.rates and loader.rates.cluster
        fields = [(c.device_flops, c.intra_node_latency) if c else None for c in (learnt, again)]
        return ratios, fields, loader.rates and loader.rates.num_batches


@pytest.mark.parametrize("world", [2, 3])
def test_a_loader_learns_from_its_ranks_and_plans_with_what_it_learnt(gloo_pool, world):
    found = gloo_pool(world).run(learn_on_a_rank, 12)
    (ratios, (learnt, again), num_batches), *others = found
    assert num_batches >= 6
    assert again == pytest.approx(learnt, rel=1e-3)
    assert ratios[0] is None
    first, *_, last = (abs(np.log(ratio)) for ratio in ratios[1:])
    assert last < first / 2  # plans predict much better than at first
    assert all(fields == [None, None] for _, fields, _ in others)  # they do not plan
