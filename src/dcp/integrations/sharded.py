"""What Trainer lacks for models of which every rank has a shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_Trainer: Any = object  # what comes behind the mixin, a Trainer, has more


class ShardedTrainerMixin(_Trainer):
    """Saves whole models of sharded ones."""

    @property
    def _is_sharded(self) -> bool:
        """Whether accelerate shards the model; Trainer's own flag says that it was asked to."""
        return bool(self.accelerator.distributed_type.name == "FSDP")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's, a folder for ``from_pretrained``; every rank calls it.

        Trainer saves nothing where checkpoints are of shards (``SHARDED_STATE_DICT``). This saves
        the whole model, gathered in the first rank's memory; checkpoints stay as they are.
        """
        if _internal_call or not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        with _whole_states(self.accelerator.state.fsdp_plugin):
            super().save_model(output_dir, _internal_call)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        if self._is_sharded and not self.accelerator._models:
            raise ValueError(
                "accelerate shards a model together with its optimiser, when training begins: "
                "evaluate after train(), or in it, at its start by eval_on_start=True"
            )
        return super().evaluation_loop(*args, **options)


@contextmanager
def _whole_states(fsdp_plugin: Any) -> Iterator[None]:
    from torch.distributed.fsdp import StateDictType

    usual = fsdp_plugin.state_dict_type
    fsdp_plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        fsdp_plugin.state_dict_type = usual


def token_group(*, tensor_parallel: int) -> Any:
    """The ranks that share out a batch's tokens; None without a group.

    Of ``tensor_parallel`` ranks that share a layer's heads, which are neighbours in transformers'
    meshes, each is in a group of its own, for they have the same tokens.
    """
    if not dist.is_initialized():
        return None
    if tensor_parallel == 1:
        return dist.group.WORLD
    ranks = range(dist.get_world_size())
    alike = [list(ranks[first::tensor_parallel]) for first in range(tensor_parallel)]
    group, _ = dist.new_subgroups_by_enumeration(alike)
    return group


def pipeline_size(model: Any) -> int:
    """Ranks that share out a model's layers."""
    return getattr(_distributed(model), "pp_size", None) or 1


def compute_dtype(args: Any, model: Any) -> str | None:
    """In which autocast or FSDP computes; None: in that of the weights."""
    if args.bf16 or getattr(_distributed(model), "fsdp_mixed_precision", False):
        return "bfloat16"
    return "float16" if args.fp16 else None


def _distributed(model: Any) -> Any:
    """How transformers distributed a model as it read it; None if it did not."""
    return getattr(getattr(model, "config", None), "distributed_config", None)
