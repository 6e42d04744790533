"""What Trainer lacks for models of which every rank has a shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def _whole_states(fsdp_plugin: Any) -> Iterator[None]:
    from torch.distributed.fsdp import StateDictType

    usual = fsdp_plugin.state_dict_type
    fsdp_plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        fsdp_plugin.state_dict_type = usual
