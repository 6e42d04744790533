"""PreferenceTrainer against one process with two sequences a pair, in the model's own attention."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dcp.data import answers_to
from dcp.integrations.preferences import PreferenceTrainer
from tests import trainer_work as work

SIZES = [(30, 9, 14), (1, 5, 1), (12, 40, 3), (25, 2, 2), (7, 20, 31), (50, 1, 6)]
BETA, RATE = 0.7, 3e-2


def pairs():
    rng = np.random.default_rng(0)
    return [[rng.integers(1, 64, length).tolist() for length in sizes] for sizes in SIZES]


def answer_logprob(model, prompt, answer):
    ids = torch.tensor(prompt + answer)
    logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1]
    return -torch.nn.functional.cross_entropy(logits, ids[len(prompt) :], reduction="sum")


def margin(model, pair):
    prompt, chosen, rejected = pair
    return answer_logprob(model, prompt, chosen) - answer_logprob(model, prompt, rejected)


def dpo(model, reference, some):
    """The mean loss over some pairs."""
    with torch.no_grad():
        before = [reference(pair) for pair in some]
    margins = torch.stack([margin(model, p) - b for p, b in zip(some, before, strict=True)])
    return -torch.nn.functional.logsigmoid(BETA * margins).mean()


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def plainly(kind, steps=2):
    """Losses and last weights of gradient descent by hand, all pairs a step."""
    model = work.make_model()
    start = copy.deepcopy(model)
    model = adapted(model) if kind == "adapters" else model
    losses = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        loss = dpo(model, lambda pair: margin(start, pair), pairs())
        for parameter, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
            parameter.data -= RATE * grad
        losses.append(loss.item())
    held_out = dpo(model, lambda pair: margin(start, pair), pairs()[:5]).item()
    return losses, [p.detach().numpy() for p in trained], held_out


def planned(output, kind):
    """The same by a rank."""
    with work.launched():
        model = work.make_model()
        samples = [answers_to(prompt, answers) for prompt, *answers in pairs()]
        tokens = 1000 if kind == "one batch" else 130
        trainer = PreferenceTrainer(
            adapted(model) if kind == "adapters" else model,
            work.arguments(
                output, max_steps=2, optim="sgd", learning_rate=RATE, max_grad_norm=1e9,
                gradient_accumulation_steps=1 if kind == "one batch" else 3,
            ),
            train_dataset=samples,
            eval_dataset=samples[:5],
            plan=work.PlanningArguments(
                tokens_per_batch=tokens, num_workers=0, look_ahead=1, strategy="zigzag",
            ),
            beta=BETA,
        )  # fmt: skip
        trainer.train()
        held_out = trainer.evaluate()["eval_loss"]
        trained = [p.detach().numpy().copy() for p in trainer.model.parameters() if p.requires_grad]
        return [line for line in trainer.state.log_history if "loss" in line], trained, held_out


@pytest.mark.parametrize("kind", ["one batch", "accumulated", "adapters"])
def test_ranks_equal_two_sequences_a_pair(gloo_pool, tmp_path, kind):
    if kind == "adapters":
        pytest.importorskip("peft")
    losses, weights, held_out = plainly(kind)
    start = [p.detach().numpy() for p in work.make_model().parameters()]
    for lines, found, evaluated in gloo_pool(2).run(planned, tmp_path, kind):
        assert [line["num_tokens"] for line in lines] == [sum(map(sum, SIZES)) + len(SIZES)] * 2
        assert all(line["attention_bytes"] > 0 for line in lines)  # pairs lie on both ranks
        np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-4)
        np.testing.assert_allclose(evaluated, held_out, rtol=1e-4)
        assert 0 <= lines[-1]["reward_accuracy"] <= 1
        for mine, theirs, first in zip(found, weights, start, strict=False):
            change = np.abs(theirs - first).max() if kind != "adapters" else RATE
            assert np.abs(mine - theirs).max() < 1e-4 * change + 2e-7  # of fp32 weights


def test_what_has_no_part_is_refused(tmp_path):
    def make(model=None, plan=None, **options):
        plan = work.PlanningArguments(tokens_per_batch=100, **(plan or {}))
        model = model or work.make_model()
        arguments = work.arguments(tmp_path, **options.pop("arguments", {}))
        with work.launched():
            return PreferenceTrainer(model, arguments, plan=plan, **options)

    windows = work.make_model("Mistral", sliding_window=5)
    for words, options in [
        ("compute_metrics has no part", {"compute_metrics": len}),
        ("the mask of preference pairs is their own, got mask='full'", {"plan": {"mask": "full"}}),
        ("beta must be more than 0, got 0.0", {"beta": 0.0}),
        ("label_smoothing_factor", {"arguments": {"label_smoothing_factor": 0.1}}),
        ("do not go with windows", {"model": windows}),
    ]:
        with pytest.raises(ValueError, match=words):
            make(**options)
