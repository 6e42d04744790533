"""DCPTrainer against plain loops over single documents, one rank, and undisturbed runs."""

import re
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback

from tests import trainer_work as work


def logits_of(model, tokens):
    return model(input_ids=torch.as_tensor(tokens)[None]).logits[0]


def loss_by_documents(model, samples):
    """Summed loss of whole documents through the model's own attention, and its labels."""
    total, count = torch.zeros(()), 0
    for sample in samples:
        tokens = torch.as_tensor(sample["input_ids"])
        if len(tokens) > 1:
            logits = logits_of(model, tokens)
            total = total + torch.nn.functional.cross_entropy(
                logits[:-1], tokens[1:], reduction="sum"
            )
        count += len(tokens) - 1
    return total, count


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def test_one_step_is_that_of_a_plain_loop(tmp_path):
    """All documents in one batch: its loss, gradient norm and update by SGD."""
    found = work.run(
        tmp_path, plan={"tokens_per_batch": 1000}, max_steps=1, optim="sgd", max_grad_norm=1e9
    )
    model = work.make_model()
    loss, count = loss_by_documents(model, work.documents())
    (loss / count).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    close(found["losses"], [float(loss.detach() / count)])
    close(found["norms"], [float(norm)])
    for weight, parameter in zip(found["weights"], model.parameters(), strict=True):
        close(weight, (parameter - 1e-2 * parameter.grad).detach().numpy(), 1e-5)


MODELS = {
    "Llama": {},
    "windows": {
        "model": {"kind": "Gemma3Text", "sliding_window": 9, "query_pre_attn_scalar": 8,
                  "layer_types": ["sliding_attention", "full_attention"]}
    },
    "experts": {"model": {"kind": "Qwen2Moe", "num_experts": 4, "num_experts_per_tok": 2,
                          "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}},
    "LoRA": {"lora": True},
    "accumulation": {"gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("world", "steps", "strategy"), [(3, 3, "auto"), (4, 20, "zigzag")], ids=["3-3", "4-20"]
)
def test_ranks_follow_one(gloo_pool, tmp_path, name, world, steps, strategy):
    """``zigzag`` cuts every document over all ranks."""
    options = {"learning_rate": 1e-3, **MODELS[name], "max_steps": steps}
    options["plan"] = {"strategy": strategy}
    one = work.run(tmp_path / "one", **options)
    for found in gloo_pool(world).run(job, tmp_path / "many", options):
        close(found["losses"], one["losses"])
        for weight, wanted in zip(found["weights"], one["weights"], strict=True):
            close(weight, wanted, 1e-3)


def job(output, options):
    return work.run(output, **options)


def test_epochs_are_whole(tmp_path):
    """Epochs differ by some batches; two of them are every token twice."""
    found = work.run(tmp_path, max_steps=-1, num_train_epochs=2)
    tokens = sum(line["num_tokens"] for line in found["log"] if "loss" in line)
    assert tokens == 2 * sum(work.LENGTHS)
    part = work.run(tmp_path, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=3)
    assert sum(line["num_tokens"] for line in part["log"] if "loss" in line) == sum(work.LENGTHS)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_resuming_changes_nothing(gloo_pool, tmp_path, step):
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": step}
    whole = work.run(tmp_path, **options)
    resume = str(tmp_path / f"checkpoint-{step}")
    again = work.run(tmp_path, resume=resume, **options)
    for weight, wanted in zip(again["weights"], whole["weights"], strict=True):
        assert np.array_equal(weight, wanted)
    assert again["losses"] == whole["losses"]  # the log goes on from the checkpoint's
    others = {**options, "resume": resume, "save_strategy": "no"}
    for found in gloo_pool(3).run(job, tmp_path / "other", others):
        close(found["losses"], whole["losses"])


def test_evaluation_is_a_mean_over_labels(gloo_pool, tmp_path):
    lengths = [70, 3, 41, 9, 100]
    options = {"eval_lengths": lengths, "max_steps": 1, "learning_rate": 0.0}
    model, samples = work.make_model(), work.documents(lengths, seed=1)
    with torch.no_grad():
        loss, count = loss_by_documents(model, samples)
        wanted = [logits_of(model, sample["input_ids"]).numpy() for sample in samples]
    for found in gloo_pool(3).run(job, tmp_path, options):
        close(found["eval"], float(loss / count))
        assert found["predictions"].shape == (5, 100, 64)
        for n, sample in enumerate(samples):
            close(found["predictions"][n, : lengths[n]], wanted[n])
            assert (
                found["label_ids"][n, 1 : lengths[n]].tolist() == sample["input_ids"][1:].tolist()
            )
            assert (found["label_ids"][n, lengths[n] :] == -100).all()


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    work.run(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    (tmp_path / "checkpoint-1" / "dcp_loader.json").unlink()
    with pytest.raises(ValueError, match=r"dcp_loader\.json is missing .* is no whole checkpoint"):
        work.run(tmp_path, resume=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("trains with 1 processes, the group has 2", {"use_cpu": False}),
        ("accelerate leaves fsdp=.* out here", {"fsdp": True}),
    ],
)
def test_what_accelerate_would_leave_out_is_refused(gloo_pool, tmp_path, words, options):
    for message in gloo_pool(2).run(refusal, tmp_path, options):
        assert re.search(words, message)


def refusal(output, options):
    try:
        work.run(output, **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("auto_find_batch_size does not go with", {"auto_find_batch_size": True}),
        ("average_tokens_across_devices=False", {"average_tokens_across_devices": False}),
    ],
)
def test_what_would_have_no_effect_is_refused(tmp_path, words, options):
    with pytest.raises(ValueError, match=words):
        work.run(tmp_path, **options)


def test_an_own_loss_function_sees_trainers_labels(gloo_pool, tmp_path):
    one = work.run(tmp_path / "one", max_steps=3)
    for losses in gloo_pool(2).run(with_own_loss, tmp_path / "own"):
        close(losses, one["losses"])


def with_own_loss(output):
    def own(outputs, labels, num_items_in_batch):
        logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return (
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        )

    with work.launched():
        trainer = work.DCPTrainer(
            work.make_model(),
            work.arguments(output, max_steps=3),
            train_dataset=work.documents(),
            compute_loss_func=own,
            plan=work.PlanningArguments(tokens_per_batch=120, num_workers=0),
        )
        trainer.train()
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_peak_memory_of_a_rank_is_measured(gloo_pool, tmp_path):
    for metrics in gloo_pool(2).run(memory, tmp_path):
        assert metrics["train_mem_cpu_peaked_delta"] > 60 << 20
        assert metrics["eval_mem_cpu_peaked_delta"] >= 0


def memory(output):
    class Hog(TrainerCallback):
        def on_step_begin(self, *args, **others):
            held = np.ones(64 << 20, dtype=np.uint8)
            time.sleep(0.1)  # for the thread that looks
            del held

    with work.launched():
        options = {"skip_memory_metrics": False, "max_steps": 2, "eval_lengths": [70, 3]}
        trainer = work.make_trainer(output, **options)
        trainer.add_callback(Hog())
        return trainer.train().metrics | trainer.evaluate()


def test_the_best_model_comes_back_when_training_stops_early(tmp_path):
    """Callbacks, rotation of checkpoints and TensorBoard are Trainer's, and see its figures."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import EarlyStoppingCallback

    with work.launched():
        trainer = work.make_trainer(
            tmp_path,
            eval_lengths=[70, 3, 41],
            learning_rate=0.3,  # from which nothing is learnt
            max_steps=30,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            load_best_model_at_end=True,
            report_to="tensorboard",
        )
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))
        trainer.train()
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        assert len(losses) == trainer.state.global_step < 30
        assert int(np.argmin(losses)) + 1 == trainer.state.best_global_step
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(kept) == 2
    assert f"checkpoint-{trainer.state.best_global_step}" in kept
    logs = [EventAccumulator(str(path)).Reload() for path in tmp_path.rglob("events.*")]
    shown = {name for log in logs for name in log.Tags()["scalars"]}
    assert {"train/compute_balance", "train/attention_bytes", "eval/loss"} <= shown
