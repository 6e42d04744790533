"""torchtitan's trainer with planned attention in place of its context parallelism.

In a ``config_registry.py`` of one's own::

    def llama3_8b_planned():
        data = PlannedDataLoader.Config(open=open_documents, tokens_per_batch=131072)
        return planned_config(llama3_8b(), data)

The data-parallel ranks share out the tokens of every batch; ranks that share a layer's heads hold
the same tokens. Each batch carries its plan to the layers as ``attention_masks``, so recomputation
attends under the plan of its batch. What cannot be honoured raises ``ValueError`` before the model
is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import lcm
from typing import Annotated, Any

import torch.distributed as dist
import tyro
from torch import Tensor
from torch.nn.functional import pad
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.trainer import Trainer

from dcp.data import DCPDataLoader
from dcp.integrations.torchtitan_attention import (
    Asked,
    CarriedPlan,
    PlannedAttention,
    asked_of,
    has_sinks,
    is_planned,
    masks_of,
    planned_model,
)
from dcp.runtime import AttentionExecutor

__all__ = ["PlannedAttention", "PlannedDataLoader", "PlannedTrainer", "planned_config"]
_NO_LABEL = -100
_Batch = tuple[dict[str, Any], Tensor]


class PlannedDataLoader(BaseDataLoader):  # type: ignore[misc]  # of torchtitan, see below
    """Batches of :class:`dcp.DCPDataLoader` without end, epoch after epoch, with their plans.

    ``training.seq_len`` is the longest document. :class:`PlannedTrainer` calls :meth:`connect`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):  # type: ignore[misc]
        open: Annotated[Callable[[Any], Any] | None, tyro.conf.Suppress] = None
        """Given torchtitan's tokenizer, returns the dataset, see :class:`dcp.DCPDataLoader`."""
        tokens_per_batch: int = 65536
        """Tokens of a batch, over all ranks."""
        mask_fn: Annotated[Any, tyro.conf.Suppress] = None
        """As for :class:`dcp.DCPDataLoader`; None: causal, with the windows that layers have."""
        options: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        """Further keywords of :class:`dcp.DCPDataLoader`."""

    def __init__(self, config: Config, *, tokenizer: Any, seq_len: int, **_: Any) -> None:
        self.config, self.tokenizer, self.seq_len = config, tokenizer, seq_len
        self._loader: DCPDataLoader | None = None

    def connect(self, asked: Asked, *, group: dist.ProcessGroup, rows_multiple: int) -> None:
        """Open the data, over the ranks that share out tokens; collective over all ranks.

        Args:
            asked: what the model asks of attention.
            group: the ranks that share out a batch, of which this is one.
            rows_multiple: fill rows up to a multiple of this.
        """
        config, several = self.config, len(asked.masks) > 1
        self.asked, self.rows_multiple = asked, rows_multiple
        assert config.open is not None
        options = {
            "max_seqlen": min(self.seq_len, config.tokens_per_batch),
            "mask_weights": asked.weights if several else None,
            **config.options,
        }
        self._loader = DCPDataLoader(
            config.open(self.tokenizer),
            (lambda seqlens, samples: asked.masks) if config.mask_fn is None else config.mask_fn,
            spec=asked.spec,
            group=dist.group.WORLD,
            attention_group=group,
            tokens_per_batch=config.tokens_per_batch,
            **options,
        )
        kernel = self._loader.cluster.kernel_for(asked.spec)
        self.executor = AttentionExecutor(group, kernel=kernel)

    @property
    def loader(self) -> DCPDataLoader:
        """The loader beneath."""
        if self._loader is None:
            raise ValueError("PlannedDataLoader is not connected: train with PlannedTrainer")
        return self._loader

    def __iter__(self) -> Iterator[_Batch]:
        while True:
            for batch, plan in self.loader:
                fill = batch.rows_to_fill(self.rows_multiple)
                masks = masks_of(plan, self.asked)
                inputs = {
                    "input": pad(batch.tokens, (0, fill))[None],
                    "positions": pad(batch.positions, (0, fill))[None],
                    "attention_masks": CarriedPlan(
                        self.executor.bind(plan), batch.positions, masks
                    ),
                }
                yield inputs, pad(batch.labels, (0, fill), value=_NO_LABEL)[None]

    def state_dict(self) -> dict[str, Any]:
        """The place in the data, for torchtitan's checkpointer: equal on all ranks."""
        return dict(self.loader.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, on any number of ranks."""
        if state_dict:
            self.loader.load_state_dict(state_dict)

    def close(self) -> None:
        """End the planning processes."""
        if self._loader is not None:
            self._loader.close()


class PlannedTrainer(Trainer):  # type: ignore[misc]
    """torchtitan's trainer, of a configuration made by :func:`planned_config`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):  # type: ignore[misc]
        pass

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        dims = self.parallel_dims
        asked = asked_of(
            config.model_spec.model,
            dtype=config.training.mixed_precision_param,
            tensor_parallel=dims.tp,
        )
        mesh = dims.get_optional_mesh("batch")  # a mesh of one rank is no group
        group = dist.new_subgroups(group_size=1)[0] if mesh is None else mesh.get_group()
        shards = dims.tp if config.parallelism.enable_sequence_parallel else 1
        chunks = getattr(config.loss, "num_chunks", 1)
        self.dataloader.connect(asked, group=group, rows_multiple=lcm(shards, chunks))

    def init_distributed(self) -> Any:
        """torchtitan's first step; what cannot be honoured is refused before."""
        check_config(self.config)
        return super().init_distributed()

    def close(self) -> None:
        """torchtitan's, and end the planning processes."""
        if hasattr(self, "dataloader"):
            self.dataloader.close()
        super().close()


def planned_config(config: Any, dataloader: PlannedDataLoader.Config) -> PlannedTrainer.Config:
    """A configuration of torchtitan's trainer, its attention and its data planned.

    Args:
        config: a ``Trainer.Config``, such as a function of a ``config_registry`` returns. A batch
            is one of tokens over all ranks, so ``training.local_batch_size`` becomes 1; and every
            batch has a plan of its own, so ``training.disable_cuda_graphs`` becomes True.
        dataloader: what to train on.

    Raises ``ValueError`` for a model that cannot be planned.
    """
    if type(config) is not Trainer.Config or config.model_spec is None:
        name = type(config).__qualname__
        raise ValueError(f"planned_config takes a Trainer.Config with a model_spec, got {name}")
    given = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    model = planned_model(config.model_spec.model)
    given |= {
        "model_spec": dataclasses.replace(config.model_spec, model=model),
        "dataloader": dataloader,
        "training": dataclasses.replace(
            config.training, local_batch_size=1, disable_cuda_graphs=True
        ),
    }
    return PlannedTrainer.Config(**given)


def check_config(config: Any) -> None:
    """Raise ``ValueError`` for the first setting that planned attention cannot honour."""
    parallelism, training, data = config.parallelism, config.training, config.dataloader
    if not isinstance(data, PlannedDataLoader.Config) or data.open is None:
        raise ValueError("dataloader must be a PlannedDataLoader.Config with open=…")
    if not is_planned(config.model_spec.model):
        raise ValueError(
            "layers have attention of their own: make the configuration with planned_config"
        )
    longest = data.options.get("max_seqlen") or 0
    layers, sharded = config.model_spec.model.layers, parallelism.tensor_parallel_degree > 1
    # Found with torchtitan's own attention, too: torchtitan 0.3.0, torch 2.13.
    wrong = sharded and parallelism.spmd_backend == "partial_dtensor"
    wrong_rows = parallelism.enable_sequence_parallel and any(layer.moe for layer in layers)
    for name, refused, remedy in (
        ("parallelism.context_parallel_degree", parallelism.context_parallel_degree > 1,
         "the data-parallel ranks share out the tokens: set it to 1"),
        ("parallelism.pipeline_parallel_degree", parallelism.pipeline_parallel_degree > 1,
         "its stages have buffers of one size, and batches differ in their rows: set it to 1"),
        ("parallelism.tensor_parallel_degree", wrong and has_sinks(config.model_spec.model),
         "torchtitan's gradients of gpt_oss's biases are wrong then: set it to 1"),
        ("parallelism.enable_sequence_parallel", wrong and wrong_rows,
         "torchtitan's gradients of experts are wrong then: set it to False"),
        ("parallelism.spmd_backend", parallelism.spmd_backend == "full_dtensor",
         "ranks differ in their rows: set it to 'partial_dtensor'"),
        ("training.local_batch_size", training.local_batch_size != 1,
         "a batch is one of tokens over all ranks: set it to 1, and dataloader.tokens_per_batch"),
        ("training.disable_cuda_graphs", not training.disable_cuda_graphs,
         "every batch has a plan of its own: set it to True"),
        ("training.seq_len", longest > training.seq_len,
         f"it is less than options['max_seqlen']={longest}: set it to that"),
        ("debug.spmd_typechecking", config.debug.spmd_typechecking,
         "attention has no such types: set it to False"),
        ("validator.enable", config.validator.enable,
         "its batches have no plans: set it to False"),
        ("dataloader.dataset", data.dataset, "the data is what open=… returns: leave it out"),
        ("dataloader.dataset_path", data.dataset_path,
         "the data is what open=… returns: leave it out"),
    ):  # fmt: skip
        if refused:
            value = config
            for part in name.split("."):
                value = getattr(value, part)
            raise ValueError(f"{name}={value!r} cannot be honoured: {remedy}")
