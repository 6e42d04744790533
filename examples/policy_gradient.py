"""Policy gradient over groups of answers (GRPO): each rank brings its own, all compute together.

    torchrun --nproc-per-node 2 examples/policy_gradient.py

Rewards and answers are made up: a real loop would sample the answers with an inference engine and
judge them. Ranks bring different numbers of groups, of different lengths; planned attention shares
out the tokens of all of them, and the prompt of a group is computed once.
"""

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer
from torch.nn.parallel import DistributedDataParallel

from dcp.data import answers_to
from dcp.integrations.logprobs import DCPModel

CLIP, STEPS, EPOCHS = 0.2, 3, 2  # batches of answers, and optimiser steps on each


def main() -> None:
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
        model.cuda()
    planned = DCPModel(DistributedDataParallel(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        samples, advantages = make_groups(tokenizer, step)
        with torch.no_grad():
            old = planned.token_logprobs(samples)
        for _ in range(EPOCHS):
            new = planned.token_logprobs(samples)
            loss = policy_loss(new, old, advantages, samples)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            now = planned.token_logprobs(samples)
        before, after = (weighted(values, advantages, samples) for values in (old, now))
        if dist.get_rank() == 0:
            stats = new.plan.stats
            print(
                f"step {step}: reward-weighted log-likelihood {before:.3f} -> {after:.3f}, "
                f"tokens {stats.token_balance:.2f} of their mean on the busiest rank"
            )
            assert after > before
    dist.destroy_process_group()


def policy_loss(new, old, advantages, samples) -> torch.Tensor:
    """The clipped objective, a mean over the answer tokens of all ranks.

    DistributedDataParallel averages gradients over ranks, so a rank's part counts that many times.
    """
    loss = new.zero  # a rank without samples goes backward, too
    for values, was, advantage, sample in zip(new, old, advantages, samples, strict=True):
        ratio, each = (values - was).exp(), per_token(advantage, sample, values.device)
        loss = loss - torch.minimum(ratio * each, ratio.clamp(1 - CLIP, 1 + CLIP) * each).sum()
    return loss * dist.get_world_size() / total(sum(map(len, new)), loss.device)


def per_token(advantage, sample, device) -> torch.Tensor:
    """An answer's advantage at each of its tokens."""
    lengths = torch.tensor(sample["answer_lengths"], device=device) - 1
    return advantage.to(device).repeat_interleave(lengths)


def weighted(values, advantages, samples) -> float:
    """Sum over all ranks of log-probabilities, each times its advantage."""
    own = [
        (each * per_token(advantage, sample, each.device)).sum()
        for each, advantage, sample in zip(values, advantages, samples, strict=True)
    ]
    return float(total(sum(own), values.zero.device))


def total(number, device) -> torch.Tensor:
    """A number summed over ranks."""
    found = torch.as_tensor(number, dtype=torch.float32, device=device).clone()
    dist.all_reduce(found)
    return found


def make_groups(tokenizer, step: int):
    """This rank's prompts with four answers each, and their advantages: polite ones are better."""
    samples, advantages = [], []
    for number in range(3 * dist.get_rank()):  # none on the first rank, three on the second, …
        prompt = "Listen. " * (20 * number + 5) + f"What is {step} + {number}?"
        answers = ["Please: ", "It is ", "Thank you, ", "No, "]
        ids = [tokenizer(text + str(step + number))["input_ids"] for text in answers]
        samples.append(answers_to(tokenizer(prompt)["input_ids"], ids))
        rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
        advantages.append((rewards - rewards.mean()) / rewards.std())
    return samples, advantages


if __name__ == "__main__":
    main()
