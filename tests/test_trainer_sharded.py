"""DCPTrainer with a model that accelerate shards (FSDP2), against one rank with the whole model."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers.distributed import DistributedConfig

from tests import trainer_work as work

OPTIONS = {
    "all weights": {"max_steps": 6},
    "LoRA": {"lora": True, "max_grad_norm": 0.05},
    "accumulation": {"gradient_accumulation_steps": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "FSDP's checkpointing": work.sharded(activation_checkpointing=True),
    "more ranks": {"max_steps": 20},
}
WORLDS = {"accumulation": 3, "more ranks": 4}


def close(found, wanted, tolerance=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def follows(found, one):
    close(found["losses"], one["losses"])
    close(found["norms"], one["norms"])
    for weight, wanted in zip(found["weights"], one["weights"], strict=True):
        close(weight, wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_shards_follow_one_rank(gloo_pool, tmp_path, name):
    options = {"max_grad_norm": 0.5, "max_steps": 2, "eval_lengths": [70, 3, 41], **OPTIONS[name]}
    one = work.run(tmp_path / "one", **{**options, "fsdp": False})
    assert max(one["norms"]) > options["max_grad_norm"]  # norms are those before clipping
    for found in gloo_pool(WORLDS.get(name, 2)).run(train, tmp_path / "many", options):
        follows(found, one)
        close(found["eval"], one["eval"])
        close(found["predictions"], one["predictions"])


def test_shards_in_bfloat16(gloo_pool, tmp_path):
    """Where FSDP casts weights and inputs, and one rank's autocast each product."""
    options = {"max_steps": 3, "bf16": True}
    one = work.run(tmp_path / "one", **options)
    for found in gloo_pool(2).run(train, tmp_path / "many", options):
        close(found["losses"], one["losses"], 5e-3)
        close(found["norms"], one["norms"], 2e-2)


def train(output, options):
    with work.sharding_on_the_cpu():
        return work.run(output, **{**work.sharded(), **options})


@pytest.mark.parametrize(
    ("kind", "sizes"), [("Llama", {"fsdp_size": 2}), ("Qwen3", {"fsdp_size": 2, "tp_size": 2})]
)
def test_models_that_transformers_distributes(gloo_pool, tmp_path, kind, sizes):
    """Sharded as they are read; ranks that share heads have the same tokens."""
    options = {"max_grad_norm": 0.5, "max_steps": 2, "eval_lengths": [70, 3, 41]}
    whole = work.make_model(kind)
    whole.save_pretrained(tmp_path / "whole")
    one = work.run(tmp_path / "one", model=whole, **options)
    world = np.prod(list(sizes.values()))
    for found in gloo_pool(world).run(train_distributed, tmp_path, sizes, options):
        follows(found, one)
        assert tokens(found) == tokens(one)
        close(found["eval"], one["eval"])
        close(found["predictions"], one["predictions"])
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for parameter, weight in zip(saved.parameters(), one["weights"], strict=True):
        close(parameter.detach(), weight)


def train_distributed(folder, sizes, options):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(**sizes)
    )
    with work.sharding_on_the_cpu(), work.launched():
        trainer = work.make_trainer(folder / "many", model=model, **options)
        trainer.train()
        trainer.save_model(folder / "saved")
        return work.outcome(trainer)


def test_adapters_of_shared_heads(gloo_pool, tmp_path):
    """Drawn otherwise where heads are shared, so one rank begins with what was saved of them."""
    peft = pytest.importorskip("peft")
    work.make_model().save_pretrained(tmp_path / "whole")
    many = gloo_pool(2).run(train_adapters, tmp_path)
    model = peft.PeftModel.from_pretrained(work.make_model(), tmp_path / "first", is_trainable=True)
    one = work.run(tmp_path / "one", model=model, max_steps=2)
    for found in many:
        follows(found, one)


def train_adapters(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(tp_size=2)
    )
    with work.sharding_on_the_cpu(), work.launched():
        trainer = work.make_trainer(folder / "many", model=model, lora=True, max_steps=2)
        trainer.save_model(folder / "first")
        trainer.train()
        return work.outcome(trainer)


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_has_its_shard_only(gloo_pool, tmp_path, world):
    whole = 4 * sum(parameter.numel() for parameter in work.make_model().parameters())
    for found in gloo_pool(world).run(bytes_of_shards, tmp_path):
        assert set(found) == {"parameters", "gradients", "exp_avg", "exp_avg_sq"}
        for name, num_bytes in found.items():
            assert num_bytes == pytest.approx(whole / world, rel=0.02), name


def bytes_of_shards(output):
    """Bytes that a rank keeps when an optimiser step is over and gradients are still there."""
    found = {}

    class Measure(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, *, model, optimizer, **others):
            parameters = list(model.parameters())
            states = [optimizer.state[parameter] for parameter in parameters]
            found["parameters"] = local_bytes(parameters)
            found["gradients"] = local_bytes(parameter.grad for parameter in parameters)
            for name in ("exp_avg", "exp_avg_sq"):
                found[name] = local_bytes(state[name] for state in states)

    with work.sharding_on_the_cpu(), work.launched():
        trainer = work.make_trainer(output, **work.sharded(), max_steps=1)
        trainer.add_callback(Measure())
        trainer.train()
    return found


def local_bytes(tensors):
    """Of the memory behind a rank's shards, several of which may lie in one allocation."""
    storages = [tensor.to_local().untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_resuming_shards(gloo_pool, tmp_path, kind):
    """Bit for bit on as many ranks; on another number, from the very batch."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options |= work.sharded(state_dict_type=kind) | {"plan": {"calibrate": False}}
    whole = gloo_pool(2).run(train, tmp_path, options)
    folder = tmp_path / "checkpoint-3"
    shards = len(list(folder.glob("pytorch_model_fsdp_0/*.distcp")))
    assert shards == (2 if kind == "SHARDED_STATE_DICT" else 0)
    options |= {"resume": str(folder), "save_strategy": "no"}
    for again, wanted in zip(gloo_pool(2).run(train, tmp_path / "2", options), whole, strict=True):
        assert again["losses"] == wanted["losses"]  # the log goes on from the checkpoint's
        for weight, other in zip(again["weights"], wanted["weights"], strict=True):
            assert np.array_equal(weight, other)
    for found in gloo_pool(4).run(train, tmp_path / "4", options):
        follows(found, whole[0])
        assert tokens(found) == tokens(whole[0])


def tokens(found):
    return [line["num_tokens"] for line in found["log"] if "loss" in line]


def test_a_saved_model_is_whole(gloo_pool, tmp_path):
    weights, _ = gloo_pool(2).run(train_and_save, tmp_path / "model", {})
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.config.architectures == ["LlamaForCausalLM"]
    for parameter, weight in zip(saved.parameters(), weights, strict=True):
        assert np.array_equal(parameter.detach(), weight)
    one = work.make_model()
    weights = work.run(tmp_path / "one", max_steps=2)["weights"]
    for parameter, weight in zip(one.parameters(), weights, strict=True):
        parameter.data = torch.from_numpy(weight)
    tokens = torch.arange(1, 20)[None]
    close(saved(tokens).logits.detach(), one(tokens).logits.detach())
    assert saved.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 22)


def test_saved_adapters_are_whole(gloo_pool, tmp_path):
    peft = pytest.importorskip("peft")
    weights, _ = gloo_pool(2).run(train_and_save, tmp_path / "model", {"lora": True})
    saved = peft.PeftModel.from_pretrained(work.make_model(), tmp_path / "model")
    adapters = [p for name, p in saved.named_parameters() if "lora" in name]
    for parameter, weight in zip(adapters, weights, strict=True):
        assert np.array_equal(parameter.detach(), weight)


def train_and_save(folder, options):
    with work.sharding_on_the_cpu(), work.launched():
        trainer = work.make_trainer(folder.parent, **work.sharded(), max_steps=2, **options)
        trainer.train()
        trainer.save_model(folder)
        return work.outcome(trainer)["weights"]


def test_what_cannot_be_sharded_is_refused(gloo_pool, tmp_path):
    work.make_model().save_pretrained(tmp_path / "whole")
    for early, pipeline in gloo_pool(2).run(refusals, tmp_path):
        assert re.search("evaluate after train", early)
        assert re.search("pipeline parallelism does not go with planned attention", pipeline)


def refusals(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "whole", distributed_config=DistributedConfig(pp_size=2)
    )
    with work.sharding_on_the_cpu(), work.launched():
        with pytest.raises(ValueError) as early:
            work.make_trainer(folder, **work.sharded(), eval_lengths=[9]).evaluate()
        with pytest.raises(ValueError) as pipeline:
            work.make_trainer(folder, model=model)
        return str(early.value), str(pipeline.value)
