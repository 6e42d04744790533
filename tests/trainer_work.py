"""Small jobs of DCPTrainer, as every rank of a pool runs them."""

import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from dcp.integrations.trainer import DCPTrainer, PlanningArguments

LENGTHS = [50, 30, 20, 40, 60, 10, 25, 35, 1, 90, 15, 44]


def documents(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, 64, n)} for n in lengths]


def make_model(kind="Llama", **others):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "pad_token_id": 0, **others,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@contextmanager
def launched():
    """As torchrun describes a group, of which accelerate learns in no other way."""
    names = {}
    if dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        for name in names:
            del os.environ[name]


def arguments(output, **others):
    values = {
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(output), **{**values, **others})


def run(output, *, model=None, lora=False, plan=None, resume=None, eval_lengths=None, **others):
    """Losses, gradient norms and last weights of a training, and what its evaluation says."""
    with launched():
        peft = None
        if lora:
            from peft import LoraConfig

            peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer = DCPTrainer(
            make_model(**(model or {})),
            arguments(output, **others),
            train_dataset=documents(),
            eval_dataset=None if eval_lengths is None else documents(eval_lengths, seed=1),
            plan=PlanningArguments(
                **{"tokens_per_batch": 120, "num_workers": 0, **(plan or {})},
            ),
            peft_config=peft,
        )
        trainer.train(resume_from_checkpoint=resume)
        log = trainer.state.log_history
        found = {
            "losses": [line["loss"] for line in log if "loss" in line],
            "norms": [line["grad_norm"] for line in log if "loss" in line],
            "log": log,
            "weights": [
                p.detach().numpy().copy() for p in trainer.model.parameters() if p.requires_grad
            ],
            "steps": trainer.state.global_step,
        }
        if eval_lengths is not None:
            found["eval"] = trainer.evaluate()["eval_loss"]
            predicted = trainer.predict(trainer.eval_dataset)
            found["predictions"], found["label_ids"] = predicted.predictions, predicted.label_ids
        return found
