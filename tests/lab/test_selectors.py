"""Selectors: the paper's own table (4 nodes) replayed, fits, one answer on all ranks."""

import pytest

from dcp import AttentionSpec, Cluster
from dcp.inference import plan_turn
from lab.inference_paper import TABLE_4
from lab.selectors import SELECTORS, Empirical, algorithm_1, algorithm_5

SPEC = AttentionSpec(num_heads=128, num_kv_heads=8, head_dim=128)


def nodes(flops: float, bandwidth: float) -> Cluster:
    return Cluster(
        num_nodes=4,
        devices_per_node=1,
        device_flops=flops,
        device_network_bandwidth=bandwidth,
        inter_node_bandwidth=bandwidth,
    )


def num_right(rule, cluster) -> int:
    return sum(
        rule(new, 128000 - new, SPEC, cluster) == ("pass_kv" if kv < q else "pass_q")
        for new, kv, q in TABLE_4
    )


@pytest.mark.parametrize(
    ("rule", "flops", "bandwidth", "right"),
    [
        (algorithm_1, 800e12, 50e9, 12),  # the paper's peaks
        (algorithm_5, 800e12, 50e9, 11),
        (algorithm_1, 510e12, 26e9, 13),  # what its table 5 implies
        (algorithm_5, 510e12, 26e9, 12),
    ],
)
def test_rules_replay_the_published_table(rule, flops, bandwidth, right):
    assert num_right(rule, nodes(flops, bandwidth)) == right


def test_a_rule_fitted_to_measurements_finds_the_faster_way(tmp_path):
    rows = [(new, 128000 - new, kv, q) for new, kv, q in TABLE_4]
    fitted = Empirical.fit(rows)
    assert num_right(fitted, nodes(1.0, 1.0)) >= 12
    fitted.save(tmp_path / "rule.json")
    assert Empirical.load(tmp_path / "rule.json") == fitted
    (tmp_path / "rule.json").write_text('{"a": 1, "x": 2}')
    with pytest.raises(ValueError, match="holds no fitted rule"):
        Empirical.load(tmp_path / "rule.json")
    with pytest.raises(ValueError, match="2 measurements are too few"):
        Empirical.fit(rows[:2])


def choices_of_rank():
    cluster = nodes(800e12, 50e9)
    rules = [*SELECTORS.values(), Empirical(0.3, 1.1, -1.0), "planned"]
    made = [plan_turn([5, 700], [[900, 3, 0, 40]] * 2, SPEC, cluster, strategy=r) for r in rules]
    return [(p.stats.strategy, p.to_bytes()) for p in made]


def test_all_ranks_agree(gloo_pool):
    one, *others = gloo_pool(3).run(choices_of_rank)
    assert all(other == one for other in others)
