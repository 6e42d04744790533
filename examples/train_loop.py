"""A context-parallel training loop: the ranks share every batch, whatever its lengths.

torchrun --nproc-per-node 4 examples/train_loop.py
"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import dcp
from dcp.data import ByteTokenizer, TokenDataset, open_documents
from dcp.integrations.transformers import local_logits, register_attention

STEPS = 10


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")

    # The model: any from transformers with attn_implementation="dcp"; the same weights everywhere.
    register_attention()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=ByteTokenizer().vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="dcp",
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # The data: documents of any length, here the sources of Python's standard library.
    dataset = TokenDataset(open_documents("python", limit=400), ByteTokenizer())
    spec = dcp.AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, dtype="float32")
    executor = dcp.AttentionExecutor()  # of the default process group, as the loader's

    with dcp.DCPDataLoader(
        dataset,
        "causal",
        spec=spec,
        tokens_per_batch=4096,
        over_long="split",
    ) as loader:
        for step, (batch, plan) in zip(range(STEPS), loader, strict=False):
            executor.prepare(plan)
            logits = local_logits(model, batch.tokens, batch.positions, executor)
            # Each rank sums over its own labels and divides by the number of all ranks' labels …
            loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            loss = batch.mean_loss(loss)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            # … so that summing over ranks gives the gradient, and the loss, of the whole batch.
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()

            dist.all_reduce(total := loss.detach())
            if executor.rank == 0:
                balance = plan.stats.compute_balance
                print(f"step {step}: loss {total:.3f}, compute balance {balance:.3f}", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
