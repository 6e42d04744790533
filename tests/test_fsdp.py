"""Planned attention in a model whose parameters FSDP2 shards: gradients equal one process's."""

import pytest
import torch

from dcp import AttentionExecutor, AttentionSpec, Cluster, SequenceBatch, plan
from dcp.program import RankPlan

pytest.importorskip("transformers")

from dcp.integrations.transformers import local_logits
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
