"""Planned attention in Megatron-Core: losses and updated weights are those of one process.

Megatron asks for CUDA: ``examples/megatron_on_cpu.py`` is what lets it run here, in processes of
their own.
"""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("megatron.core")

from tests.megatron_cases import (
    called_with_an_executor,
    cut_of,
    make_config,
    refusals,
    run_example,
    train_alone,
    train_planned,
)
from tests.pool import GlooPool


@pytest.fixture(scope="module")
def ranks():
    """``ranks(world)``: processes in which Megatron runs on the CPU."""
    pools = {}

    def get(world):
        if world not in pools or not pools[world].is_alive:
            pools[world] = GlooPool(world)
        return pools[world]

    yield get
    for each in pools.values():
        each.close()


alone = {}


def check(ranks, kind, *, attention, options=None, wanted=None, **split):
    """Trained on ranks as on one: by default, one that runs Megatron's own attention."""
    world = attention * split.get("tensor", 1) * split.get("pipeline", 1)
    results = ranks(world).run(train_planned, kind, split, options or {})
    steps = results[0][1]
    key = kind, (options or {}).get("documents")
    if wanted is not None:
        alone[key] = wanted
    if key not in alone:
        alone[key] = steps, *ranks(1).run(train_alone, kind, steps)[0]
    same_steps, losses, weights = alone[key]
    assert steps == same_steps
    for found, _, parts in results:
        assert found == pytest.approx(losses, rel=1e-5)
        for name, part, cut in parts:
            wanted = cut_of(name, torch.from_numpy(weights[name]), cut).numpy()
            assert np.abs(part - wanted).max() < 1e-5, name


SPLITS = [(1, 1), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize(("tensor", "attention"), SPLITS)
@pytest.mark.parametrize("kind", ["dense", "GQA", "sequence-parallel", "MoE"])
def test_tensor_and_attention_ranks(ranks, kind, tensor, attention):
    check(ranks, kind, tensor=tensor, attention=attention)


@pytest.mark.parametrize("kind", ["MLA", "MLA and YaRN"])
def test_latent_attention(ranks, kind):
    check(ranks, kind, attention=2)


@pytest.mark.parametrize("kind", ["llama3 scaling", "YaRN"])
def test_rotary_embeddings_that_are_scaled(ranks, kind):
    check(ranks, kind, attention=2)


@pytest.mark.parametrize("kind", ["MQA", "windows", "sinks", "layer scaling"])
def test_attention_as_the_configuration_asks(ranks, kind):
    check(ranks, kind, tensor=2, attention=2)


@pytest.mark.parametrize("kind", ["recomputed", "recomputed attention"])
def test_recomputation_attends_by_the_plan_of_its_micro_batch(ranks, kind):
    check(ranks, kind, pipeline=2, attention=2)


@pytest.mark.parametrize(("tensor", "attention"), [(1, 2), (2, 1)])
def test_stages_of_a_pipeline(ranks, tensor, attention):
    check(ranks, "sequence-parallel", pipeline=2, tensor=tensor, attention=attention)


def test_interleaved_pipeline(ranks):
    check(ranks, "interleaved", pipeline=2, virtual=2, attention=2)


def test_micro_batches_without_documents(ranks):
    check(ranks, "GQA", pipeline=2, attention=1, options={"documents": 1})


@pytest.mark.parametrize("kind", ["balanced MoE", "biased MoE"])
def test_auxiliary_losses_go_by_all_tokens(ranks, kind):
    (one,) = ranks(1).run(train_planned, kind, {}, {"own_router": True})
    losses, steps, parts = one
    wanted = steps, losses, {name: part for name, part, _ in parts}
    check(ranks, kind, tensor=2, attention=2, expert=4, wanted=wanted)
    check(ranks, kind, pipeline=2, tensor=2, attention=1, wanted=wanted)


@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_are_shared_by_attention_ranks(ranks, tensor):
    check(ranks, "MoE", tensor=tensor, attention=2, expert=2 * tensor)


def test_distributed_optimizer(ranks):
    check(ranks, "GQA", attention=2, options={"distributed": True})


def test_the_example_has_the_same_losses_for_any_split_of_the_ranks(ranks):
    losses = {}
    for tensor, pipeline, world in ((1, 1, 1), (2, 1, 4), (1, 2, 2)):
        words = ["--tensor-parallel", tensor, "--pipeline-parallel", pipeline]
        said = ranks(world).run(run_example, [*map(str, words), "--steps", "4", "--json"])
        losses[world] = json.loads(said[0].splitlines()[-1])["losses"]
        assert not any(said[1:])
    assert len(losses[1]) == 4
    assert losses[1][3] < 0.9 * losses[1][0]
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)


def test_core_attention_alone_goes_by_the_plan_that_its_executor_has_prepared(ranks):
    for found, wanted in ranks(2).run(called_with_an_executor):
        assert np.abs(found - wanted).max() < 1e-5


def test_a_checkpoint_goes_on_with_another_split_of_the_ranks(ranks, tmp_path):
    straight, steps, _ = ranks(1).run(train_planned, "GQA", {}, {})[0]
    folder = str(tmp_path)
    first = ranks(2).run(train_planned, "GQA", {"tensor": 2}, {"steps": 1, "save": folder})
    second = ranks(2).run(train_planned, "GQA", {}, {"steps": 1, "load": folder})
    assert [first[0][1][0], second[0][1][0]] == steps
    assert first[0][0] + second[0][0] == pytest.approx(straight, rel=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("context_parallel_size", 2),
        ("attention_dropout", 0.1),
        ("calculate_per_token_loss", False),
        ("cache_mla_latents", True),
        ("experimental_attention_variant", "dsa"),
        ("mtp_num_layers", 1),
        ("is_hybrid_model", True),
        ("window_size", (-1, 0)),
        ("window_size", (8, 8)),
        ("qk_clip", True),
        ("fused_single_qkv_rope", True),
        ("fp8_dot_product_attention", True),
        ("cuda_graph_impl", "local"),
        ("tp_comm_overlap", True),
        ("moe_expert_capacity_factor", 1.5),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_load_balancing_type", "seq_aux_loss"),
    ],
)
def test_refused_by_name(field, value):
    from dcp.integrations.megatron_checks import check_config

    config = make_config("MoE")
    check_config(config)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"^{field}=.* cannot be honoured: "):
        check_config(config)


def test_refused_where_ranks_differ_in_rows():
    from dcp.integrations.megatron_checks import check_config

    config = make_config("MoE", pipeline=2)
    config.variable_seq_lengths = False
    with pytest.raises(ValueError, match="variable_seq_lengths=False"):
        check_config(config)
    config = make_config("interleaved", pipeline=2, virtual=2)
    check_config(config)
    config.overlap_p2p_comm = False
    with pytest.raises(ValueError, match="overlap_p2p_comm=False cannot be honoured by an inter"):
        check_config(config)
    config = make_config("MoE", expert=2)
    config.moe_token_dispatcher_type = "allgather"
    with pytest.raises(ValueError, match="moe_token_dispatcher_type='allgather'"):
        check_config(config)


def test_refused_where_the_model_is_made_or_called(ranks):
    (messages,) = ranks(1).run(refusals)
    for part, message in messages.items():
        assert part in message
