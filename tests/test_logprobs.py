"""DCPModel against one process that computes every sample alone, with the model's own attention."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")

from dcp.integrations.logprobs import DCPModel  # noqa: E402
from tests.model_cases import make_config, make_model  # noqa: E402

TEMPERATURE = 0.7
OPTIONS = {"plan_options": {"block_size": 16}}  # so that the few tokens are shared out


def ids(length, seed):
    return np.random.default_rng(seed).integers(0, 50, length).tolist()


def labelled(length, seed, kept):
    """Labels beside their tokens, of which the last ``kept`` count."""
    tokens = ids(length, seed)
    return {"input_ids": tokens, "labels": [-100] * (length - kept) + tokens[length - kept :]}


# of three ranks, or the first two
LISTS = {
    "unequal": [
        [ids(70, 0), labelled(20, 1, 5), torch.tensor(ids(1, 2))],
        [labelled(33, 3, 33)],
        [[], ids(9, 4)],
    ],
    "one has all": [[], [ids(90, 5), ids(64, 6), labelled(50, 7, 0)], []],
}


def objective(values, number):
    """Something of all values of a sample that is no sum over tokens."""
    return torch.tanh(values.sum() / 10) * (number + 1)


def alone(lists):
    """Values, entropies and gradients of one process: each sample by itself, losses summed."""
    model = make_model(make_config("eager"))
    values, entropies = [], []
    for samples in lists:
        for number, sample in enumerate(samples):
            sample = sample if isinstance(sample, dict) else {"input_ids": sample}
            tokens = torch.as_tensor(sample["input_ids"], dtype=torch.int64)
            labels = torch.as_tensor(sample.get("labels", tokens))[1:]
            if len(tokens) < 2:
                values.append(torch.zeros(0))
                entropies.append(torch.zeros(0))
                continue
            logits = model(input_ids=tokens[None]).logits[0, :-1][labels >= 0] / TEMPERATURE
            spread = torch.distributions.Categorical(logits=logits, validate_args=False)
            values.append(spread.log_prob(labels[labels >= 0]))
            entropies.append(spread.entropy())
            loss = objective(values[-1], number) + 0.1 * entropies[-1].square().sum()
            loss.backward()
    return values, entropies, [p.grad for p in model.parameters()]


def together(lists, kind, averaged=False):
    """The same by a rank of a group, gradients summed over it."""
    model = make_model(make_config("eager"))
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    parameters = list(model.parameters())
    if kind == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    planned = DCPModel(model, **OPTIONS)
    found = planned.token_logprobs(
        lists[dist.get_rank()], temperature=TEMPERATURE, with_entropy=True
    )
    loss = found.zero
    for number, (values, entropy) in enumerate(zip(found, found.entropies, strict=True)):
        loss = loss + objective(values, number) + 0.1 * entropy.square().sum()
    loss.backward()
    for parameter in parameters:
        if kind == "ddp":  # a mean over ranks
            parameter.grad *= dist.get_world_size()
        else:
            dist.all_reduce(parameter.grad)
    return [
        [each.detach().numpy() for each in found],
        [each.detach().numpy() for each in found.entropies],
        [p.grad.numpy() for p in parameters],
    ]


def close(found, wanted, tolerance):
    """Relative to the greatest of what is wanted."""
    wanted = wanted.detach().numpy()
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= tolerance * np.abs(wanted).max(initial=1e-30)


@pytest.mark.parametrize("kind", ["plain", "ddp", "checkpointed"])
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(gloo_pool, world, name, kind):
    lists = LISTS[name][:world]
    results = gloo_pool(world).run(together, lists, kind)
    values, entropies, grads = alone(lists)
    for place, wanted in ((0, values), (1, entropies)):
        found = [each for result in results for each in result[place]]
        for mine, theirs in zip(found, wanted, strict=True):
            close(mine, theirs, 1e-5)
    for _, _, found in results:
        for mine, theirs in zip(found, grads, strict=True):
            close(mine, theirs, 1e-4)
