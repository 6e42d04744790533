"""Selectors: the paper's own table replayed, fits of measurements, one answer on all ranks."""

import pytest

from dcp import AttentionSpec, Cluster
from dcp.inference import SELECTORS, Empirical, algorithm_1, algorithm_5, plan_turn

# Table 4 of arXiv 2411.01783: new tokens of 128,000 and milliseconds of both ways, on 4 nodes.
TABLE_4 = [
    (1280, 1023.39, 898.71), (3200, 1110.18, 1046.43), (4160, 1298.92, 1280.10),
    (6400, 1305.56, 1302.01), (12800, 2080.67, 2205.27), (25600, 3353.02, 3617.02),
    (38400, 4629.23, 4922.52), (51200, 5745.08, 6217.83), (64000, 6845.21, 7367.99),
    (76800, 7890.35, 8468.66), (89600, 8697.27, 9666.62), (102400, 10105.78, 10652.39),
    (115200, 11136.40, 11571.62), (128000, 11462.15, 12360.57),
]  # fmt: skip
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
    rules = [*SELECTORS, Empirical(0.3, 1.1, -1.0), "planned"]
    made = [plan_turn([5, 700], [[900, 3, 0, 40]] * 2, SPEC, cluster, strategy=r) for r in rules]
    return [(p.stats.strategy, p.to_bytes()) for p in made]


def test_all_ranks_agree(gloo_pool):
    one, *others = gloo_pool(3).run(choices_of_rank)
    assert all(other == one for other in others)
