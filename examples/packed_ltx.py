"""LTX-Video trained on videos of many sizes, packed into one sequence that all ranks share.

torchrun --nproc-per-node 4 examples/packed_ltx.py
"""

import json

import numpy as np
import torch
import torch.distributed as dist
from diffusers import LTXVideoTransformer3DModel

import dcp
from dcp.datacentric.clips import CHANNELS, TEXT_SIZE, synthetic_latents
from dcp.integrations.packed_video import PackedLTX

STEPS = 4
SHAPES = [(5, 6, 8), (1, 10, 10), (3, 4, 7), (9, 4, 4), (1, 3, 5)]  # latents of a batch's videos


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()

    # The model: any LTX-Video, the same weights everywhere; a random small one here.
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_SIZE,
    )
    executor = dcp.AttentionExecutor()
    packed = PackedLTX(model, executor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    cluster = dcp.Cluster(num_nodes=1, devices_per_node=num_ranks)

    losses = []
    for step in range(STEPS):
        # Every rank plans the batch by itself, and gets the same plan.
        plan = dcp.plan(packed.batch(SHAPES), packed.spec, cluster)
        executor.prepare(plan)
        share = packed.share(plan, SHAPES)
        # A rank needs the videos of which it has tokens; noise and time belong to the video.
        times = torch.from_numpy(np.random.default_rng([step]).random(len(SHAPES))).float()
        clean, noise, texts = [], [], []
        for number, shape in enumerate(SHAPES):
            rng = np.random.default_rng([step, number])
            latents, text = synthetic_latents(shape, rng)
            clean.append(torch.from_numpy(latents))
            noise.append(torch.from_numpy(rng.standard_normal(latents.shape)).float())
            texts.append(torch.from_numpy(text))
        start, end = share.rows(clean), share.rows(noise)
        noisy = start + share.of_samples(times)[:, None] * (end - start)
        output = model(**share.inputs(noisy, texts, 1000 * times)).sample
        # Each rank sums over its own numbers and divides by the number of all ranks' …
        error = (share.local(output) - (end - start)).square().sum()
        loss = error / sum(video.numel() for video in clean)
        optimizer.zero_grad()
        loss.backward()
        # … so that summing over ranks gives the gradient, and the loss, of the whole batch.
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        dist.all_reduce(total := loss.detach())
        losses.append(float(total))
    if rank == 0:
        print(json.dumps({"losses": losses}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
