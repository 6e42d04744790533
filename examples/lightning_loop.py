"""A loop of one's own with Lightning Fabric (pip install lightning-fabric).

torchrun --nproc-per-node 2 examples/lightning_loop.py
"""

import json
import os

import torch
from lightning_fabric import Fabric
from tiny import SPEC, TOKENS, make_byte_model, sources

import dcp
from dcp.integrations.transformers import local_logits, register_attention

STEPS = 4


def main() -> None:
    torch.set_num_threads(1)
    world, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    fabric = Fabric(devices=here, num_nodes=world // here, strategy="ddp")
    fabric.launch()
    register_attention()
    model = make_byte_model(attn_implementation="dcp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = fabric.setup(model, optimizer)

    executor = dcp.AttentionExecutor()
    losses = []
    # No fabric.setup_dataloaders: the loader shares out the tokens itself.
    with dcp.DCPDataLoader(
        sources(), spec=SPEC, tokens_per_batch=TOKENS, over_long="split", device=fabric.device
    ) as loader:
        for _, (batch, plan) in zip(range(STEPS), loader, strict=False):
            executor.prepare(plan)
            logits = local_logits(model, batch.tokens, batch.positions, executor)
            loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            loss = batch.mean_loss(loss)
            # the strategy averages gradients over the processes; the loss wants their sum
            fabric.backward(loss * fabric.world_size)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach(), reduce_op="sum").item())

    if fabric.is_global_zero:
        print(json.dumps({"losses": losses}))


if __name__ == "__main__":
    main()
