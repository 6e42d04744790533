"""Train a video transformer of diffusers data-centrically, on clips of many sizes.

    torchrun --nproc-per-node 2 examples/data_centric_wan.py [--model FOLDER]

All that is written for it is the workload: the sizes of its samples and their loss. How tokens are
split over a group of ranks, Wan declares itself. Without a model, a tiny one is made, and the clips
are noise: nothing is loaded.
"""

import argparse

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from transformers import TrainingArguments, set_seed

from dcp.datacentric import DataCentricArguments, DataCentricTrainer, DiffusersWorkload

SIZES = [(1, 4, 6), (2, 4, 6), (3, 6, 6), (5, 4, 6)]  # of latents: frames, rows and columns


class Clips(DiffusersWorkload):
    """Latents ``[channels, frames, rows, columns]``, each with the embedding of its text."""

    clips: list[tuple[torch.Tensor, torch.Tensor]]

    def sizes(self):
        return [tuple(latents.shape[1:]) for latents, _ in self.clips]

    def loss(self, model, samples, epoch):
        clean, text = map(torch.stack, zip(*(self.clips[n] for n in samples), strict=True))
        drawn = [self.generator(n, epoch) for n in samples]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=rng) for rng in drawn])
        time = torch.stack([torch.rand(1, generator=rng) for rng in drawn])
        clean, text, noise, time = (x.to(self.device) for x in (clean, text, noise, time))
        flow = model(clean.lerp(noise, time[..., None, None, None]), time[:, 0] * 1000, text).sample
        return (flow - (noise - clean)).square().flatten(1).mean(1).sum()


def main() -> None:
    options = parse()
    set_seed(0)
    args = TrainingArguments(
        options.output,
        max_steps=options.steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=not torch.cuda.is_available(),  # else accelerate would not join the processes
    )
    model = WanTransformer3DModel.from_pretrained(options.model) if options.model else make_model()
    workload = Clips(model, device=args.device)
    workload.clips = [make_clip(model, size) for size in SIZES * 3]
    config = DataCentricArguments(preset="inter+PAC", max_batch_size=2)
    trainer = DataCentricTrainer(workload, args, config)
    trainer.train()
    if args.process_index == 0:
        model.save_pretrained(f"{options.output}/model")
    if dist.is_initialized():
        dist.destroy_process_group()


def make_model() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, num_layers=3, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=72, rope_max_seq_len=32,
    )  # fmt: skip


def make_clip(model: WanTransformer3DModel, size: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return torch.randn(model.config.in_channels, *size), torch.randn(8, model.config.text_dim)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a Wan transformer")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="runs/data-centric-wan")
    return parser.parse_args()


if __name__ == "__main__":
    main()
