"""Rotary frequencies that depend on the longest sequence: the batch's, not the rank's."""

import copy

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan
from dcp.program import RankPlan

T = pytest.importorskip("transformers")

from dcp.inference import InferenceEngine  # noqa: E402
from dcp.integrations.transformers import local_logits  # noqa: E402
from tests.model_cases import make_config, make_model, make_tokens  # noqa: E402

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.0, 2.0, 4.0, 8.0]
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


def dynamic(attention):
    return make_config(attention, max_position_embeddings=16, rope_scaling=dict(DYNAMIC))


def longrope(attention):
    rope = LONGROPE | {"original_max_position_embeddings": 16}
    sizes = {"max_position_embeddings": 64, "pad_token_id": 0}
    sizes["original_max_position_embeddings"] = 16
    return make_config(attention, T.Phi3Config, rope_scaling=rope, **sizes)


def phimoe(attention):
    rope = LONGROPE | {"original_max_position_embeddings": 16}
    rope |= {"short_mscale": 1.0, "long_mscale": 1.3}
    sizes = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
    sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    return make_config(attention, T.PhimoeConfig, rope_scaling=rope, **sizes)


def run_rank(messages, make, seqlens):
    executor, found = AttentionExecutor(), []
    model = make_model(make("dcp"))
    for message, lengths in zip(messages[executor.rank], seqlens, strict=True):
        rank_plan = RankPlan.from_bytes(message)
        executor.prepare(rank_plan)
        tokens = make_tokens(lengths)[torch.from_numpy(rank_plan.token_indices)]
        positions = torch.from_numpy(rank_plan.positions)
        with torch.no_grad():
            found.append(local_logits(model, tokens, positions, executor).numpy())
    return found


@pytest.mark.parametrize("make", [dynamic, longrope, phimoe])
def test_two_ranks_equal_one_process(gloo_pool, make):
    """Batch after batch: what an earlier one had must not matter."""
    seqlens = [[64], [40], [9], [64]]
    plans = [
        plan(SequenceBatch(of), SPEC, Cluster(devices_per_node=2), strategy="ring", block_size=8)
        for of in seqlens
    ]
    messages = [[p.rank_plan(rank).to_bytes() for p in plans] for rank in range(2)]
    results = gloo_pool(2).run(run_rank, messages, make, seqlens)
    for index, (a_plan, (seqlen,)) in enumerate(zip(plans, seqlens, strict=True)):
        found = a_plan.unshard([torch.from_numpy(of[index]) for of in results])
        with torch.no_grad():
            wanted = make_model(make("eager"))(input_ids=make_tokens([seqlen])[None]).logits[0]
        assert (found - wanted).abs().max() < 1e-5, seqlen


def test_a_batch_has_the_frequencies_of_its_longest_sequence():
    config, seqlens = dynamic("dcp"), [40, 24]
    executor = AttentionExecutor()
    executor.prepare(plan(SequenceBatch(seqlens), SPEC, Cluster(devices_per_node=1)).rank_plan(0))
    positions = torch.cat([torch.arange(seqlen) for seqlen in seqlens])
    tokens = make_tokens(seqlens)
    reference = copy.deepcopy(config)
    reference._attn_implementation = "eager"
    with torch.no_grad():
        found = local_logits(make_model(config), tokens, positions, executor)
        model = make_model(reference)
        first = model(input_ids=tokens[None, :40]).logits[0]
        model.model.rotary_emb.original_max_seq_len = 0  # so that it keeps the first's frequencies
        second = model(input_ids=tokens[None, 40:]).logits[0]
    assert (found - torch.cat([first, second])).abs().max() < 1e-5


def test_calling_the_model_itself_is_refused():
    model, executor = make_model(dynamic("dcp")), AttentionExecutor()
    executor.prepare(plan(SequenceBatch([17]), SPEC, Cluster(devices_per_node=1)).rank_plan(0))
    positions = torch.arange(17)[None]
    with pytest.raises(ValueError, match=r"beyond 16 tokens, here 17: call .* local_logits"):
        model(input_ids=make_tokens([17])[None], position_ids=positions, dcp_executor=executor)


@pytest.mark.parametrize("make", [dynamic, longrope])
def test_conversations_within_the_limit_are_right_and_longer_ones_refused(make):
    model = make_model(make("eager")).eval()
    prompt = make_tokens([10]).tolist()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()
    engine = InferenceEngine(model, num_ranks=2, num_pages=16, page_size=4)
    assert engine.generate({"a": prompt}, max_new_tokens=1)["a"] == [int(wanted)]
    with pytest.raises(ValueError, match=r"17 tokens is beyond 16.*depend on its length"):
        engine.generate({"a": prompt[:6]}, max_new_tokens=1)


def test_engines_refuse_layers_that_mix_tokens():
    config = make_config("eager", T.Lfm2Config, layer_types=["conv", "full_attention"])
    with pytest.raises(ValueError, match="Lfm2 has layers of conv: dcp shares"):
        InferenceEngine(make_model(config), num_ranks=1)
