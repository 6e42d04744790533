"""torchtitan's debug models: trained over planned batches on ranks, or by its own attention."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import types
from importlib import import_module
from itertools import chain
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

LENGTHS = [70, 33, 5, 1, 120, 64, 17, 90, 40, 11, 77, 150]
STEPS, TOKENS, LONGEST = 2, 200, 192
# so large an epsilon that small gradients make small steps, and their sums' order no difference
ADAM = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1.0, "weight_decay": 0.1}


def documents(tokenizer=None):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2048, n) for n in LENGTHS]


def start():
    """What every rank does first."""
    if "LOCAL_RANK" not in os.environ:
        from tests.torchtitan_on_cpu import run_on_cpu

        run_on_cpu()
        rank = str(dist.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}


def registered(name, *, balanced=False):
    """The specification of a debug model with two layers."""
    spec = import_module(f"torchtitan.models.{name}").model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    if name == "gpt_oss":  # a window that documents exceed
        windowed = spec.model.layers[0].attention
        windowed.sliding_window_size, windowed.inner_attention.window_size = 20, (19, 0)
    for layer in spec.model.layers:
        if layer.moe is not None and not balanced:
            layer.moe.load_balance_coeff = None
    return spec


def make_config(name, folder, **others):
    """A configuration of torchtitan's own trainer, before it is planned."""
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    class NoTokenizer(BaseTokenizer):
        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config=None, **_):
            pass

        encode = decode = get_vocab_size = None

    NoTokenizer.__abstractmethods__ = frozenset()
    spec = registered(name, balanced=others.pop("balanced", False))
    training = TrainingConfig(
        seq_len=LONGEST, steps=STEPS, mixed_precision_param="float32", max_norm=1e9,
        disable_cuda_graphs=True,
        **others.pop("training", {}),
    )  # fmt: skip
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **others.pop("parallelism", {}))
    return Trainer.Config(
        model_spec=spec,
        dump_folder=str(folder),
        tokenizer=NoTokenizer.Config(),
        loss=others.pop("loss", None) or CrossEntropyLoss.Config(global_vocab_size=2048),
        optimizer=default_adamw(**ADAM),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=training,
        parallelism=parallelism,
        metrics=MetricsProcessor.Config(log_freq=1),
        activation_checkpoint=others.pop("activation_checkpoint", None),
        **others,
    )


def planned(name, folder, *, data=None, **others):
    from dcp.integrations.torchtitan import PlannedDataLoader, planned_config

    given = {"options": {"num_workers": 0, "plan_options": {"block_size": 16}}, **(data or {})}
    data = PlannedDataLoader.Config(open=documents, tokens_per_batch=TOKENS, **given)
    return planned_config(make_config(name, folder, **others), data)


def weight(name, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
    return 1 + 0.1 * values if "norm" in name else 0.05 * values


def named(model):
    for name, parameter in model.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        yield name, parameter


@torch.no_grad()
def set_weights(model):
    """The same ones however they are cut, by name."""
    for name, parameter in named(model):
        whole = weight(name, parameter.shape)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)


class Recorded:
    """A loader that remembers the documents it gave."""

    def __init__(self, loader):
        self.loader, self.pieces = loader, []

    def __iter__(self):
        for batch, plan in self.loader:
            self.pieces.append(batch.pieces.tolist())
            yield batch, plan

    def __getattr__(self, name):
        return getattr(self.loader, name)


def train(config):
    """Losses, rates and documents of each step, and the whole weights, of a trainer that ran."""
    trainer = config.build()
    try:
        for part in trainer.model_parts:
            set_weights(part)
        recorded = trainer.dataloader._loader = Recorded(trainer.dataloader.loader)
        losses, rates = [], []
        log = trainer.metrics_processor.log

        def note(step, loss, *args, **options):
            losses.append(loss)
            rates.append(options["extra_metrics"]["lr/AdamW"])
            log(step, loss, *args, **options)

        trainer.metrics_processor.log = note
        trainer.train()
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for part in trainer.model_parts
            for name, p in named(part)
        }
    finally:
        trainer.close()
    accumulated = trainer.gradient_accumulation_steps
    pieces = recorded.pieces
    per_step = [pieces[i : i + accumulated] for i in range(0, len(pieces), accumulated)]
    return losses, rates, [list(chain(*some)) for some in per_step], weights


# ---------------------------------------------------------------------- torchtitan's own attention


class DenseAttention(torch.nn.Module):
    """What FlexAttention computes for one causal document, window and sinks included: torchtitan's
    own kernels that know both run on accelerators only."""

    def __init__(self, window):
        super().__init__()
        self.window = window

    def forward(self, q, k, v, *, scale, out_transform, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        before = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (before < 0) | (before >= (self.window or len(before)))
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ v
        return out_transform(out.transpose(1, 2), lse.transpose(1, 2))


def own_model(name, balanced):
    """The model with attention of torchtitan's own."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.attention import ScaledDotProductAttention

    set_spmd_backend("partial_dtensor")
    config = registered(name, balanced=balanced).model
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=LONGEST)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    for layer, made in zip(config.layers, model.layers.values(), strict=True):
        inner = made.attention.inner_attention
        inner.sdpa_backends = [torch.nn.attention.SDPBackend.MATH]
        if name == "gpt_oss":
            made.attention.inner_attention = DenseAttention(layer.attention.sliding_window_size)
    set_weights(model)
    return model


def train_alone(name, steps, rates, *, balanced):
    """Losses and weights of one process with torchtitan's own attention, document by document."""
    from torchtitan.components.optimizer import register_moe_load_balancing_hook

    model = own_model(name, balanced)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    one = types.SimpleNamespace(get_optional_mesh=lambda name: None, ep_enabled=False, tp=1)
    register_moe_load_balancing_hook(optimizer, [model], one)
    losses, texts = [], [torch.from_numpy(text) for text in documents()]
    for pieces, rate in zip(steps, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        labels, total = sum(stop - begin - 1 for _, begin, stop in pieces), 0.0
        for document, begin, stop in pieces:
            if begin < stop:
                ids = texts[document][begin:stop]
                logits = model(ids[None], torch.arange(len(ids))[None])[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum") / labels
                loss.backward()
                total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses, dict(named(model))


def as_configs(options):
    """Options of :func:`make_config`, of words that the test's own process can say."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import activation_checkpoint

    made = dict(options)
    if made.pop("chunked", False):
        inner = CrossEntropyLoss.Config(global_vocab_size=2048)
        made["loss"] = ChunkedLossWrapper.Config(loss_fn=inner)
    if kind := made.pop("recomputed", None):
        made["activation_checkpoint"] = getattr(activation_checkpoint, kind).Config()
    if backend := made.pop("compiled", None):
        made["compile"] = CompileConfig(enable=True, components=["model"], backend=backend)
    return made


_alone = {}


def compare(name, others):
    """Losses of planned training and of one process alone, and the worst difference of weights;
    on the first rank, the others return None."""
    start()
    with tempfile.TemporaryDirectory() as folder:
        losses, rates, steps, weights = train(planned(name, folder, **as_configs(others)))
    if dist.get_rank() > 0:
        return None
    key = name, others.get("balanced", False), repr(steps)
    if key not in _alone:
        _alone[key] = train_alone(name, steps, rates, balanced=key[1])
    wanted, own = _alone[key]
    assert weights.keys() == own.keys()
    return losses, wanted, {n: float((weights[n] - own[n].detach()).abs().max()) for n in own}


def train_from_command_line(folder, words):
    """Losses, checkpoints and weights of the example, as ``torchtitan.train`` reads the words."""
    start()
    from torchtitan.config import ConfigManager

    module = ["--module", "examples.torchtitan_llama3", "--config", "llama3_planned"]
    config = ConfigManager().parse_args([*module, "--dump-folder", str(folder), *words])
    losses, _, _, weights = train(config)
    return losses, {name: values.numpy() for name, values in weights.items()}
