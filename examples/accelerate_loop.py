"""A loop of one's own with accelerate: the loader as it is, model and optimizer prepared.

torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

import json

import torch
from accelerate import Accelerator
from tiny import SPEC, TOKENS, make_byte_model, sources

import dcp
from dcp.integrations.transformers import local_logits, register_attention

STEPS = 4


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    register_attention()
    model = make_byte_model(attn_implementation="dcp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)

    executor = dcp.AttentionExecutor()
    losses = []
    # The loader is not prepared: it shares out the tokens itself.
    with dcp.DCPDataLoader(
        sources(),
        spec=SPEC,
        tokens_per_batch=TOKENS,
        over_long="split",
        device=accelerator.device,
    ) as loader:
        for _, (batch, plan) in zip(range(STEPS), loader, strict=False):
            executor.prepare(plan)
            logits = local_logits(model, batch.tokens, batch.positions, executor)
            loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            loss = batch.mean_loss(loss)
            # accelerate's wrappers average gradients over the processes; the loss wants their sum
            accelerator.backward(loss * accelerator.num_processes)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "sum").item())

    if accelerator.is_main_process:
        print(json.dumps({"losses": losses}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
