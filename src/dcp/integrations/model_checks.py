"""What must hold of a model for its tokens to be shared out: tokens meet in attention alone.

A row of local tokens is neither whole nor in order. So a model may learn a token's place from
``position_ids`` only, and tokens may meet in no layer but attention, all of which must come to dcp.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

_MIXERS = re.compile(
    "Mamba|SSM|StateSpace|LinearAttention|LightningAttention|DeltaNet|DeltaAttention|Recurrent"
    "|ShortConv|Retention|Rwkv|[xms]LSTM|Hyena|Indexer"
)
#: Kinds with a fixed list of attention classes of their own, by the name of that list.
OWN_TABLES = {"falcon": "FALCON_ATTENTION_CLASSES", "gpt_neo": "GPT_NEO_ATTENTION_CLASSES"}
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_TRIED = "_dcp_tried"  # set on a model whose trial went well
_ROWS = [5, 3, 1, 0]  # of six tokens, in another order: none of them stays where it was
#: Largest difference of a token's logits, relative to the greatest of them, by bytes of the dtype.
_TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 5e-2}


def check_model(model: nn.Module) -> None:
    """Refuse a model that dcp attention cannot serve, by its configuration and modules.

    Raises ``ValueError`` for encoder-decoders, for models that know no ``position_ids`` or do not
    pass keywords on, for layers that mix tokens outside attention (convolutions, state space,
    linear attention), and for temperatures that count rows.
    """
    name, config = _name(model), text_config(model)
    parameters = inspect.signature(inner_model(model).forward).parameters
    refused = {
        "is an encoder-decoder, whose attentions run between two sequences": getattr(
            config, "is_encoder_decoder", False
        ),
        "takes no position_ids, so it would count the local rows": "position_ids" not in parameters,
        "takes no further keywords, so its layers would not learn of the plan": not any(
            p.kind is p.VAR_KEYWORD for p in parameters.values()
        ),
        "scales queries by their row (attn_temperature_tuning): set it to False": getattr(
            config, "attn_temperature_tuning", False
        ),
    }
    for why, holds in refused.items():
        if holds:
            raise ValueError(f"{name} cannot be used with dcp attention: it {why}")
    if mixers := _mixers(model, config):
        raise ValueError(
            f"{name} cannot be used with dcp attention: its layers mix tokens outside attention "
            f"({', '.join(sorted(mixers))}), and a rank has not all tokens before its own"
        )


def check_calls(model: nn.Module, calls: deque[str]) -> None:
    """Raise ``ValueError`` unless each attention layer of ``model`` called dcp attention once.

    Args:
        calls: classes of the layers that did, in turn. No list, for FSDP gives layers copies of
            lists, dicts and dataclasses where it casts what they are called with.
    """
    layers = getattr(text_config(model), "num_hidden_layers", None) or max(len(calls), 1)
    if len(calls) != layers:
        raise ValueError(
            f"{len(calls)} of {layers} attention layers of {_name(model)} called dcp attention: it "
            "can only be used where each does once, through the registry of transformers "
            '(attn_implementation="dcp")'
        )


def check_logits(model: nn.Module, output: Any, rows: int | None) -> Tensor:
    """The logits of ``output``, ``[rows, …]``; ``ValueError`` unless there are some per token."""
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{_name(model)} returns no logits: use a model with a head per token")
    if logits.ndim != 3 or (rows is not None and logits.shape[1] != rows):
        raise ValueError(
            f"{_name(model)} returns logits of shape {tuple(logits.shape)} for {rows} tokens: a "
            "head per sequence would take its token from this rank's; use one that has logits for "
            "each token, and pick from them"
        )
    return logits[0]


def text_config(model: nn.Module) -> Any:
    """The configuration of the layers that read text; None of a model that has none."""
    config = getattr(inner_model(model), "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else None


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch, such as DistributedDataParallel."""
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def _name(model: nn.Module) -> str:
    return type(inner_model(model)).__name__


def _mixers(model: nn.Module, config: Any) -> set[str]:
    """Names of what mixes tokens outside attention."""
    found = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    family = type(config).__name__.removesuffix("Config")  # it may be named for what it mixes with
    for module in model.modules():
        mixes = isinstance(module, nn.RNNBase | nn.modules.batchnorm._BatchNorm) or (
            isinstance(module, nn.Conv1d) and module.kernel_size != (1,)
        )
        if mixes or _MIXERS.search(type(module).__name__.removeprefix(family)):
            found.add(type(module).__name__)
    return found


# ---------------------------------------------------------------------- a trial


class Trial:
    """Takes an executor's place: attention in which no token sees another."""

    plan = None

    def attention(self, q: Tensor, kv: Any, **_: Any) -> Tensor:
        k, v = (kv[:, 0], kv[:, 1]) if isinstance(kv, Tensor) else kv
        weight = q.mean(-1, keepdim=True)  # so that a row's own query, key and value all count
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return v * (1 + weight) + k.mean(-1, keepdim=True)


def try_model(model: nn.Module) -> None:
    """Run a model once on a few tokens that do not see each other, and once on some of them.

    A token must get the same logits both times. If none does, the model mixes tokens, or counts
    rows, where dcp cannot know of it. Raises ``ValueError`` for that, and for a model that fails.
    The modes and random state of the model are as before; a model is tried only once.
    """
    inner = inner_model(model)
    if getattr(inner, _TRIED, False):
        return
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    device = parameter.device
    vocab = getattr(text_config(model), "vocab_size", None) or 6
    tokens = torch.arange(6, device=device) % vocab
    positions, rows = torch.arange(6, device=device), torch.tensor(_ROWS, device=device)
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            every = _trial_logits(model, tokens, positions)
            some = _trial_logits(model, tokens[rows], positions[rows])
    finally:
        for module, mode in modes.items():
            module.training = mode
    wanted = every[rows].double()
    error = (some.double() - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp(min=1e-30)
    if (error > _TOLERANCE[parameter.dtype.itemsize]).all():
        raise ValueError(
            f"{_name(model)} cannot be used with dcp attention: outside attention, what becomes of "
            "a token depends on others or on its row, and a rank has neither all nor their order"
        )
    setattr(inner, _TRIED, True)


def _trial_logits(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    calls: deque[str] = deque()
    try:
        output = getattr(model, "_orig_mod", model)(
            input_ids=tokens[None],
            position_ids=positions[None],
            dcp_executor=Trial(),
            dcp_calls=calls,
        )
    except ValueError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if "'Asked'" in reason:
            reason = "its layers compute with the attention mask"
        raise ValueError(f"{_name(model)} cannot be used with dcp attention: {reason}") from error
    check_calls(model, calls)
    return check_logits(model, output, len(tokens))


# ---------------------------------------------------------------------- rotary embeddings


def rotary_limit(config: Any) -> int | None:
    """Tokens beyond which rotary frequencies depend on the longest sequence; None if never."""
    rotary = getattr(config, "rope_parameters", None) or {}
    sets = [rotary, *(each for each in rotary.values() if isinstance(each, dict))]
    if not any(_depends(each.get("rope_type")) for each in sets):
        return None
    name = "original_max_position_embeddings"
    limits = [getattr(config, name, None), *(each.get(name) for each in sets)]
    return min(filter(None, limits), default=config.max_position_embeddings)


def _depends(rope_type: Any) -> bool:
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


@contextmanager
def frequencies_for(model: nn.Module, longest: int) -> Iterator[None]:
    """Let rotary embeddings of ``model`` choose their frequencies as if one sequence had
    ``longest`` tokens, whichever of its tokens are here and whatever came before."""
    if rotary_limit(text_config(model)) is None:
        yield
        return

    def append(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)  # dynamic frequencies would keep to the longest ever seen
        given = list(args)
        holder: Any = kwargs if "position_ids" in kwargs else given
        place: Any = "position_ids"
        if holder is given:
            place = list(inspect.signature(module.forward).parameters).index(place)
        last = torch.full_like(holder[place][..., :1], longest - 1)
        holder[place] = torch.cat([holder[place], last], dim=-1)
        return tuple(given), kwargs

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        every = output if isinstance(output, tuple) else (output,)
        kept = tuple(each[..., :-1, :] for each in every)
        return kept if isinstance(output, tuple) else kept[0]

    hooks = []
    for module in model.modules():
        if "position_ids" in inspect.signature(module.forward).parameters and re.search(
            "Rotary|Rope", type(module).__name__
        ):
            hooks += [
                module.register_forward_pre_hook(append, with_kwargs=True),
                module.register_forward_hook(cut),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
