"""Small jobs of DCPTrainer, as every rank of a pool runs them."""

import os
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
import transformers
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from dcp.integrations.trainer import DCPTrainer, PlanningArguments
from tests.pool import run_script

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
        names |= {"GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}
    forget_accelerate()
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        forget_accelerate()
        for name in names:
            del os.environ[name]


def forget_accelerate():
    """What accelerate and TrainingArguments leave in a process: for the next job, all of it."""
    AcceleratorState._reset_state(True)
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


@contextmanager
def sharding_on_the_cpu():
    """accelerate shards on accelerators alone: here its state says that it shards on CPUs, too."""
    unpatched, check = AcceleratorState.__init__, ParallelismConfig._validate_accelerator

    def __init__(self, *args, fsdp_plugin=None, **options):
        unpatched(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = __init__
    ParallelismConfig._validate_accelerator = lambda *args: None
    try:
        yield
    finally:
        AcceleratorState.__init__, ParallelismConfig._validate_accelerator = unpatched, check


def sharded(**others):
    """Arguments for FSDP2."""
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {
        "fsdp": True,
        "fsdp_config": {**layers, "state_dict_type": "SHARDED_STATE_DICT", **others},
    }


def arguments(output, **others):
    values = {
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 1,
        "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(output), **{**values, **others})


def run_example(path, words):
    """What an example prints on a rank of this group, which torchrun would have started."""
    with launched():
        return run_script(path, words)


def make_trainer(output, *, model=None, lora=False, plan=None, eval_lengths=None, **others):
    peft = None
    if lora:
        from peft import LoraConfig

        peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if not isinstance(model, torch.nn.Module):
        model = make_model(**(model or {}))
    torch.manual_seed(0)  # of adapters
    return DCPTrainer(
        model,
        arguments(output, **others),
        train_dataset=documents(),
        eval_dataset=None if eval_lengths is None else documents(eval_lengths, seed=1),
        plan=PlanningArguments(
            **{"tokens_per_batch": 120, "num_workers": 0, **(plan or {})},
        ),
        peft_config=peft,
    )


def run(output, *, resume=None, **options):
    """What :func:`outcome` says of a training."""
    with launched():
        trainer = make_trainer(output, **options)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer)


def outcome(trainer):
    """Losses, gradient norms and last weights of a training, and what its evaluation says."""
    log = trainer.state.log_history
    found = {
        "losses": [line["loss"] for line in log if "loss" in line],
        "norms": [line["grad_norm"] for line in log if "loss" in line],
        "log": log,
        "weights": [whole(p) for p in trainer.model.parameters() if p.requires_grad],
        "steps": trainer.state.global_step,
    }
    if trainer.eval_dataset is not None:
        found["eval"] = trainer.evaluate()["eval_loss"]
        predicted = trainer.predict(trainer.eval_dataset)
        found["predictions"], found["label_ids"] = predicted.predictions, predicted.label_ids
    return found


def whole(parameter):
    """Values of a parameter, of which a rank may have a shard."""
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).numpy().copy()
