"""Two stages of torch.distributed.pipelining, each attending under the plan of its micro-batch.

torchrun --nproc-per-node 4 examples/pipelining.py      # 2 stages of 2 ranks that share tokens
"""

import json
from itertools import islice

import torch
import torch.distributed as dist
from tiny import SPEC, TOKENS, make_byte_model, sources
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy, pad

import dcp
from dcp.integrations.transformers import register_attention

STAGES, MICRO_BATCHES, STEPS = 2, 3, 2


class Stage(torch.nn.Module):
    """Half of a Llama. All micro-batches have as many rows, for a pipeline's buffers have one size:
    as many as a batch has tokens, because a plan may give them all to one rank."""

    def __init__(self, model: torch.nn.Module, *, index: int) -> None:
        super().__init__()
        body, half = model.model, len(model.model.layers) // STAGES
        first, last = index == 0, index == STAGES - 1
        self.embed = body.embed_tokens if first else None
        self.layers = body.layers[index * half : (index + 1) * half]
        self.rotary = body.rotary_emb
        self.head = torch.nn.Sequential(body.norm, model.lm_head) if last else None
        self.plans: list = []  # of each micro-batch: its plan, and its rows' positions

    def forward(self, rows: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        bound, positions = self.plans[int(number)]
        hidden = rows if self.embed is None else self.embed(rows)
        carried = {
            "dcp_executor": bound,
            "dcp_stand_ins": TOKENS - bound.plan.num_local_tokens,
            "position_embeddings": self.rotary(hidden, positions[None]),
        }
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, **carried)
        return hidden if self.head is None else self.head(hidden)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shape = STAGES, dist.get_world_size() // STAGES
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("stage", "attention"))
    index, attention = mesh.get_local_rank("stage"), mesh.get_group("attention")

    register_attention()
    part = Stage(make_byte_model(attn_implementation="dcp"), index=index)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    stage = PipelineStage(part, index, STAGES, torch.device("cpu"), group=mesh.get_group("stage"))
    labels_in_step = 1  # of all micro-batches and ranks: the loss is a mean over them

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits[0], labels[0], reduction="sum") / labels_in_step

    schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=loss_fn, scale_grads=False)
    executor = dcp.AttentionExecutor(attention)
    found = []
    # Ranks of all stages take part; those with the same rank in `attention` get the same tokens.
    with dcp.DCPDataLoader(
        sources(), spec=SPEC, attention_group=attention, tokens_per_batch=TOKENS, over_long="split"
    ) as loader:
        batches = iter(loader)
        for _ in range(STEPS):
            taken = list(islice(batches, MICRO_BATCHES))
            fills = [TOKENS - len(batch.tokens) for batch, _ in taken]
            tokens, positions, labels = (
                torch.stack([pad(getattr(b, of), (0, n), value=value) for (b, _), n in
                             zip(taken, fills, strict=True)])
                for of, value in (("tokens", 0), ("positions", 0), ("labels", -100))
            )  # fmt: skip
            labels_in_step = sum(batch.num_loss_tokens for batch, _ in taken)
            bound = [executor.bind(plan) for _, plan in taken]  # several plans are on the way
            part.plans = list(zip(bound, positions, strict=True))
            losses: list[torch.Tensor] = []
            numbers = torch.arange(MICRO_BATCHES)[:, None]
            if index == 0:
                schedule.step(tokens, number=numbers)
            else:
                schedule.step(target=labels, losses=losses, number=numbers)
            for parameter in part.parameters():
                dist.all_reduce(parameter.grad, group=attention)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            total = sum(losses, torch.zeros(())).detach()
            dist.all_reduce(total)
            found.append(total.item())

    if dist.get_rank() == 0:
        print(json.dumps({"losses": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
