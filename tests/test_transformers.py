"""The attention that transformers calls: equal to its own, and honest about what it cannot do."""

import copy

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan
from dcp.program import RankPlan

transformers = pytest.importorskip("transformers")

from dcp.integrations.transformers import dcp_attention, local_logits  # noqa: E402
from tests.model_cases import make_config, make_model, make_tokens  # noqa: E402

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")


def run_rank(message, seqlens):
    """Logits of the rank's tokens, and its part of the gradients of their squared sum."""
    executor = AttentionExecutor()
    rank_plan = RankPlan.from_bytes(message[executor.rank])
    executor.prepare(rank_plan)
    model = make_model(make_config("dcp"))
    tokens = make_tokens(seqlens)[torch.from_numpy(rank_plan.token_indices)]
    logits = local_logits(model, tokens, torch.from_numpy(rank_plan.positions), executor)
    logits.square().sum().backward()
    return logits.detach().numpy(), [p.grad.numpy() for p in model.parameters()]


@pytest.mark.parametrize(
    ("strategy", "seqlens", "most_idle"),
    [("zigzag", [40, 0, 1, 17, 64], 0), ("data_parallel", [3], 2)],
)
def test_ranks_together_equal_one_model(gloo_pool, strategy, seqlens, most_idle):
    cluster = Cluster(devices_per_node=3)
    a_plan = plan(SequenceBatch(seqlens), SPEC, cluster, strategy=strategy, block_size=16)
    assert (a_plan.rank_tokens == 0).sum() == most_idle  # ranks without tokens
    moved = a_plan.stats.intra_node_bytes
    assert (moved > 0) == (most_idle == 0), "whole models on one rank would prove nothing"
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(3)]
    results = gloo_pool(3).run(run_rank, messages, seqlens)
    logits = a_plan.unshard([torch.from_numpy(found) for found, _ in results])

    model, start = make_model(make_config("eager")), 0
    for seqlen in filter(None, seqlens):
        ids = make_tokens(seqlens)[start : start + seqlen]
        wanted = model(input_ids=ids[None]).logits[0]
        wanted.square().sum().backward()
        assert (logits[start : start + seqlen] - wanted).abs().max() < 1e-5
        start += seqlen
    for index, parameter in enumerate(model.parameters()):
        total = sum(torch.from_numpy(grads[index]) for _, grads in results)
        assert (total - parameter.grad).abs().max() < 1e-4 * parameter.grad.abs().max()


def call(batch=1, keys=5, mask=None, dropout=0.0, executor=True, **others):
    executor = AttentionExecutor() if executor else None
    if executor:
        executor.prepare(plan(SequenceBatch([5]), SPEC, Cluster(devices_per_node=1)))
    query, key = torch.zeros(batch, 4, 5, 8), torch.zeros(batch, 2, keys, 8)
    return dcp_attention(None, query, key, key, mask, dropout, dcp_executor=executor, **others)[0]


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("dcp_executor=executor", {"executor": False}),
        ("one row of local tokens, got 2", {"batch": 2}),
        ("use_cache=False", {"keys": 9}),
        ("masks belong to the plan", {"mask": torch.zeros(1, 1, 5, 5)}),
        (r"dropout=0\.1", {"dropout": 0.1}),
        ("sliding_window=4", {"sliding_window": 4}),
        (r"head_mask cannot be honoured", {"head_mask": torch.zeros(4)}),
        ("softcap must be positive", {"softcap": -1.0}),
        ("'other'", {"dcp_mask": "other"}),
    ],
)
def test_what_cannot_be_honoured_raises(match, arguments):
    assert call().shape == (1, 5, 4, 8)
    with pytest.raises(ValueError, match=match):
        call(**arguments)


def test_sliding_layers_use_the_mask_that_was_planned_for_them():
    config = make_config("dcp", transformers.MistralConfig, sliding_window=4)
    model, ids = make_model(config), make_tokens([12])[None]
    batch = SequenceBatch([12], {"all": "causal", "near": [near_mask(12)]})
    executor = AttentionExecutor()
    executor.prepare(plan(batch, SPEC, Cluster(devices_per_node=1)))
    positions = torch.arange(12)[None]
    with pytest.raises(ValueError, match="dcp_sliding_mask"):
        model(input_ids=ids, position_ids=positions, dcp_executor=executor)
    found = model(
        input_ids=ids, position_ids=positions, dcp_executor=executor, dcp_sliding_mask="near"
    ).logits
    reference = copy.deepcopy(config)
    reference._attn_implementation = "eager"
    wanted = make_model(reference)(input_ids=ids).logits
    assert (found - wanted).abs().max() < 1e-5


def near_mask(seqlen):
    from dcp import AttnMask

    return AttnMask.sliding_window(seqlen, 4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_of_models_that_have_them(name):
    kind = {"gemma2": transformers.Gemma2Config, "gpt_oss": transformers.GptOssConfig}[name]
    extra = {
        "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "pad_token_id": 0},
        "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    }[name]
    layers = {"layer_types": ["full_attention"] * 2}
    config = make_config("dcp", kind, **extra, **layers)
    model, ids = make_model(config), make_tokens([12])
    with torch.no_grad():  # sinks and weights large enough to matter
        for parameter in model.parameters():
            parameter.mul_(4)
    executor = AttentionExecutor()
    executor.prepare(plan(SequenceBatch([12]), SPEC, Cluster(devices_per_node=1)))
    found = local_logits(model, ids, torch.arange(12), executor)
    reference = copy.deepcopy(config)
    reference._attn_implementation = "eager"
    eager = make_model(reference)
    eager.load_state_dict(model.state_dict())
    wanted = eager(input_ids=ids[None]).logits[0]
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
