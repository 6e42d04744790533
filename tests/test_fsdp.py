"""Planned attention in a model whose parameters FSDP2 shards: gradients equal one process's."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dcp import AttentionExecutor, AttentionSpec, Cluster, DCPDataLoader, SequenceBatch, plan
from dcp.program import RankPlan

pytest.importorskip("transformers")

from dcp.integrations.transformers import attention_of, local_logits, register_attention
from tests.model_cases import make_config, make_model, make_tokens

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
SEQLENS = [40, 1, 17, 64]


def run_rank(message, checkpointed):
    """Logits of the rank's tokens, and the whole gradients that FSDP sums over ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    executor = AttentionExecutor()
    rank_plan = RankPlan.from_bytes(message[executor.rank])
    executor.prepare(rank_plan)
    model = make_model(make_config("dcp"))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    mesh = init_device_mesh("cpu", (executor.num_ranks,))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # a sum: the loss has the global count of tokens
        module.set_force_sum_reduction_for_comms(True)  # which gloo can do
    tokens = make_tokens(SEQLENS)[torch.from_numpy(rank_plan.token_indices)]
    logits = local_logits(model, tokens, torch.from_numpy(rank_plan.positions), executor)
    logits.square().sum().backward()
    return logits.detach().numpy(), [p.grad.full_tensor().numpy() for p in model.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sharded_parameters(gloo_pool, checkpointed):
    a_plan = plan(SequenceBatch(SEQLENS), SPEC, Cluster(devices_per_node=2), block_size=16)
    messages = [a_plan.rank_plan(rank).to_bytes() for rank in range(2)]
    results = gloo_pool(2).run(run_rank, messages, checkpointed)

    model = make_model(make_config("eager"))
    logits = a_plan.unshard([torch.from_numpy(found) for found, _ in results])
    for ids, found in zip(make_tokens(SEQLENS).split(SEQLENS), logits.split(SEQLENS), strict=True):
        wanted = model(input_ids=ids[None]).logits[0]
        wanted.square().sum().backward()
        assert (found - wanted).abs().max() < 1e-5
    for parameter, *grads in zip(model.parameters(), *(g for _, g in results), strict=True):
        for grad in grads:
            difference = (torch.from_numpy(grad) - parameter.grad).abs().max()
            assert difference < 1e-4 * parameter.grad.abs().max()


LENGTHS = [70, 33, 5, 1, 120, 64, 17, 90, 40, 11, 77]


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 50, n) for n in LENGTHS]


@pytest.mark.parametrize("way", ["by hand", "transformers"])
def test_ranks_share_heads_and_parameters(gloo_pool, tmp_path, way):
    """Two ranks share each layer's heads (tensor parallelism), two the tokens and parameters."""
    make_model(make_config("eager")).save_pretrained(tmp_path)
    results = gloo_pool(4).run(run_shared_heads, tmp_path, way)
    model = make_model(make_config("eager"))
    seen = {len(document): torch.from_numpy(document) for document in documents()}
    sizes = results[0]["seqlens"]
    wanted = torch.zeros(())
    for ids in (seen[size] for size in sizes if size > 1):
        logits = model(input_ids=ids[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
        wanted = wanted + loss / sum(size - 1 for size in sizes)
    wanted.backward()
    for found in results:
        assert found["loss"] == pytest.approx(wanted.item(), rel=1e-5)
        for parameter, grad in zip(model.parameters(), found["grads"], strict=True):
            difference = (torch.from_numpy(grad) - parameter.grad).abs().max()
            assert difference < 1e-5 * parameter.grad.abs().max()
            assert found["num_heads"] == (2, 1)


def run_shared_heads(folder, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    model = (shared_by_hand if way == "by hand" else shared_by_transformers)(folder, mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # see run_rank
            module.set_force_sum_reduction_for_comms(True)
    group = mesh["fsdp"].get_group()  # whose ranks share out the tokens
    spec = attention_of(model, tensor_parallel=2).spec
    options = {"tokens_per_batch": 300, "num_workers": 0}
    loader = DCPDataLoader(
        documents(), spec=spec, group=dist.group.WORLD, attention_group=group, **options
    )
    with loader:
        batch, rank_plan = next(iter(loader))
    executor = AttentionExecutor(group)
    executor.prepare(rank_plan)
    logits = local_logits(model, batch.tokens, batch.positions, executor)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    loss = loss / batch.num_loss_tokens
    loss.backward()
    dist.all_reduce(total := loss.detach().clone(), group=group)
    return {
        "loss": total.item(),
        "grads": [p.grad.full_tensor().numpy() for p in model.parameters()],
        "seqlens": batch.seqlens.tolist(),
        "num_heads": (spec.num_heads, spec.num_kv_heads),
    }


def shared_by_hand(folder, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    columns += ("mlp.gate_proj", "mlp.up_proj")
    ways = {name: ColwiseParallel() for name in columns}
    ways |= {name: RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    model = make_model(make_config("dcp"))
    for layer in model.model.layers:
        parallelize_module(layer, mesh["tp"], ways)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh["fsdp"])
    return model


def shared_by_transformers(folder, mesh):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    register_attention()
    sizes = DistributedConfig(tp_plan="auto", tp_size=2, fsdp_size=2)
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=sizes, attn_implementation="dcp"
    )
