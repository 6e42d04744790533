"""DCPModel against one process that computes every sample alone, with the model's own attention."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers")

from dcp import AttnMask  # noqa: E402
from dcp.data import answers_to  # noqa: E402
from dcp.integrations.logprobs import DCPModel  # noqa: E402
from tests.model_cases import make_config, make_model  # noqa: E402

TEMPERATURE = 0.7
OPTIONS = {"strategy": "zigzag", "plan_options": {"block_size": 16}}  # which cuts all samples


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
    assert found.plan.stats.intra_node_bytes > 0
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


GROUPS = [
    [([1, 2, 3, 4, 5], [[6, 7], [8], [9, 10, 11] * 9]), ([4], [[3, 2, 1]])],
    [([12] * 40, [[5, 6], [], [7]])],
    [],
]


def groups_alone(groups):
    model, values = make_model(make_config("eager")), []
    for prompt, answers in (each for of in groups for each in of):
        for answer in answers:
            tokens = torch.tensor(prompt + answer)
            logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1]
            values.append(
                -torch.nn.functional.cross_entropy(logits, tokens[len(prompt) :], reduction="none")
            )
    torch.cat(values).square().sum().backward()
    return values, [p.grad for p in model.parameters()]


def groups_together(groups):
    planned = DCPModel(make_model(make_config("eager")), **OPTIONS)
    samples = [answers_to(prompt, answers) for prompt, answers in groups[dist.get_rank()]]
    found = planned.token_logprobs(samples)
    loss = found.zero + sum(values.square().sum() for values in found)
    loss.backward()
    for parameter in planned.model.parameters():
        dist.all_reduce(parameter.grad)
    parted = [
        values.detach().split([n - 1 for n in sample["answer_lengths"]])
        for values, sample in zip(found, samples, strict=True)
    ]
    grads = [p.grad.numpy() for p in planned.model.parameters()]
    return [values.numpy() for of in parted for values in of], grads


@pytest.mark.parametrize("world", [2, 3])
def test_answers_to_one_prompt_equal_separate_samples(gloo_pool, world):
    groups = GROUPS[:world]
    wanted, wanted_grads = groups_alone(groups)
    results = gloo_pool(world).run(groups_together, groups)
    for mine, theirs in zip([v for values, _ in results for v in values], wanted, strict=True):
        close(mine, theirs, 1e-5)
    for _, grads in results:
        for mine, theirs in zip(grads, wanted_grads, strict=True):
            close(mine, theirs, 1e-4)


def test_samples_of_answers():
    sample = answers_to(torch.tensor([5, 6, 7]), [np.array([8]), [], [9, 10]])
    assert sample["input_ids"].tolist() == [5, 6, 7, 8, 7, 7, 9, 10]
    assert sample["labels"].tolist() == [-100, -100, -100, 8, -100, -100, 9, 10]
    assert sample["answer"].tolist() == [-1, -1, 0, -1, -1, 2, 2, -1]
    assert sample["answer_lengths"] == [2, 1, 3]
    for prompt, answers, words in [
        ([], [[1]], "the prompt has no tokens"),
        ([1], [], "a prompt without answers"),
        ([1], [[2], [[3]]], r"answer 1 must be a vector of token ids, got int64 of shape \(1, 1\)"),
        ([0.5], [[1]], "the prompt must be a vector of token ids, got float64"),
    ]:
        with pytest.raises(ValueError, match=words):
            answers_to(prompt, answers)


# --------------------------------------------------------------------------- ways to call it


def with_adapters(lists):
    """A policy against itself without adapters, over two calls and one backward."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(make_config("eager")), config)
    planned = DCPModel(model, **OPTIONS)
    mine, swapped = lists[dist.get_rank()], lists[1 - dist.get_rank()]
    with torch.no_grad(), model.disable_adapter():
        old = planned.token_logprobs(mine)
    assert not old.zero.requires_grad
    first, second = planned.token_logprobs(mine), planned.token_logprobs(swapped)
    loss = first.zero + second.zero
    for new, was in zip(first, old, strict=True):
        loss = loss + (new - was).square().sum()
    for new in second:
        loss = loss + new.sum() / 3
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        dist.all_reduce(parameter.grad)
    model.set_attn_implementation("eager")  # and by itself: the oracle
    grads, total = [p.grad.numpy().copy() for p in trained], 0.0
    model.zero_grad()
    for sample in (sample for of in lists for sample in of if len(sample) > 1):
        tokens = torch.tensor(sample)
        new = by_itself(model, tokens)
        with torch.no_grad(), model.disable_adapter():
            was = by_itself(model, tokens)
        total = total + (new - was).square().sum() + new.sum() / 3
    total.backward()
    return grads, [p.grad for p in trained]


def by_itself(model, tokens):
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    return -torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def test_adapters_and_several_calls_before_one_backward(gloo_pool):
    pytest.importorskip("peft")
    lists = [[ids(40, 0), ids(3, 1)], [ids(25, 2)]]
    for found, wanted in gloo_pool(2).run(with_adapters, lists):
        for mine, theirs in zip(found, wanted, strict=True):
            close(mine, theirs, 1e-4)


def sharded(lists):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model(make_config("eager"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # which gloo can do
    found = DCPModel(model, **OPTIONS).token_logprobs(lists[dist.get_rank()])
    loss = found.zero + sum(objective(values, number) for number, values in enumerate(found))
    loss.backward()
    return [p.grad.full_tensor().numpy() for p in model.parameters()]


def test_sharded_parameters(gloo_pool):
    lists = [[], [ids(60, 0), ids(31, 1)]]
    model = make_model(make_config("eager"))
    for number, sample in enumerate(lists[1]):
        objective(by_itself(model, torch.tensor(sample)), number).backward()
    for grads in gloo_pool(2).run(sharded, lists):
        for mine, parameter in zip(grads, model.parameters(), strict=True):
            close(mine, parameter.grad, 1e-4)


def one_brings_all(long):
    """What empty lists give, how even the plan is, and rows of logits that this rank made."""
    model, rows = make_model(make_config("eager")), []
    planned = DCPModel(model, strategy="bisection")
    nothing = planned.token_logprobs([])
    nothing.zero.backward()
    model.lm_head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    found = planned.token_logprobs(long if dist.get_rank() == 0 else [])
    return len(nothing), found.plan.stats.compute_balance, found.plan.stats.token_balance, rows


def test_one_ranks_long_samples_are_shared_out(gloo_pool):
    samples = [labelled(length, length, 40) for length in (800, 500, 300)]
    results = gloo_pool(3).run(one_brings_all, samples)
    for nothing, compute, tokens, _ in results:
        assert nothing == 0
        assert compute < 1.5  # of 3 if one had it all; launches outweigh such short samples
        assert tokens < 1.3
    made = [sum(rows) for *_, rows in results]
    assert sum(made) == 3 * 40  # rows with a label, and no others
    assert max(made) < 3 * 40


class KeepsAll(transformers.LlamaForCausalLM):
    """A model that computes every row's logits, as some do."""

    def forward(self, input_ids=None, position_ids=None, **others):
        assert "logits_to_keep" not in others
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


def test_a_model_without_logits_to_keep():
    samples = [ids(30, 0), labelled(20, 1, 5)]
    wanted = DCPModel(make_model(make_config("eager"))).token_logprobs(samples)
    torch.manual_seed(0)
    found = DCPModel(KeepsAll(make_config("eager"))).token_logprobs(samples)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine.detach().numpy(), theirs, 1e-6)


def test_own_masks():
    """A mask function sees the samples as they are given; positions follow its segments."""
    seen = []

    def mask_fn(seqlens, samples):
        seen.extend(sample["parts"] for sample in samples)
        return [AttnMask.documents(sample["parts"]) for sample in samples]

    parts = [ids(7, 0), ids(1, 1), ids(12, 2)]
    sample = {"input_ids": [*parts[0], *parts[1], *parts[2]], "parts": list(map(len, parts))}
    model = make_model(make_config("eager"))
    (found,) = DCPModel(model, mask=mask_fn).token_logprobs([sample])
    model.set_attn_implementation("eager")
    wanted = torch.cat([by_itself(model, torch.tensor(part)) for part in parts])
    close(found.detach().numpy(), wanted, 1e-5)
    assert seen == [[7, 1, 12]]


# --------------------------------------------------------------------------- mistakes


BAD = [
    ([0.5], "sample 1 of rank 1: input_ids .* must be a vector of integers"),
    ([3, 50], "sample 1 of rank 1: input_ids .* has 50: .* below vocab_size=50"),
    ({"labels": [1]}, "sample 1 of rank 1: .* has no 'input_ids'"),
    ({"input_ids": [1, 2], "labels": [1]}, "sample 1 of rank 1: labels .* has 1 entries for 2"),
    ({"input_ids": [1], "answer_lengths": [2]}, r"rank 1: answer_lengths \[2\] make more than"),
    (3, "sample 1 of rank 1: input_ids .* must be a vector"),
]  # fmt: skip


def refusals(cases):
    planned, found = DCPModel(make_model(make_config("eager")), **OPTIONS), []
    for sample, options in cases:
        good = {"input_ids": [1, 2, 3], "advantage": 0.5}  # a key of the caller's
        with torch.set_grad_enabled(options.pop("gradient", True)):
            try:
                planned.token_logprobs([good, sample] if dist.get_rank() else [good], **options)
                found.append("")
            except ValueError as error:
                found.append(str(error))
    values = planned.token_logprobs([good])  # and goes on
    return found, len(values[0])


def test_a_bad_sample_is_refused_on_all_ranks(gloo_pool):
    cases = [(sample, {}) for sample, _ in BAD]
    for messages, count in gloo_pool(2).run(refusals, cases):
        assert count == 2
        for (_, words), message in zip(BAD, messages, strict=True):
            assert re.search(words, message)


def differing():
    planned, found = DCPModel(make_model(make_config("eager")), **OPTIONS), []
    own = dist.get_rank()
    for temperature, gradient in [(1.0 + own, True), (1.0, own == 0), (-float(own), True)]:
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError) as caught:
            planned.token_logprobs([[1, 2]], temperature=temperature)
        found.append(str(caught.value))
    return found


def test_ranks_that_ask_for_different_things(gloo_pool):
    for temperature, gradient, negative in gloo_pool(2).run(differing):
        assert "rank 1 asks for {'temperature': 2.0" in temperature
        assert "with gradients on all or none" in gradient
        assert "temperature must be positive, got -" in negative or "got 0" in negative


def test_windows_do_not_follow_answers_into_a_prompt():
    kind = transformers.MistralConfig
    planned = DCPModel(make_model(make_config("eager", kind, sliding_window=5)), **OPTIONS)
    assert len(planned.token_logprobs([ids(30, 0)])[0]) == 29
    with pytest.raises(ValueError, match="give each answer as a sample of its own"):
        planned.token_logprobs([answers_to([1, 2], [[3], [4]])])
