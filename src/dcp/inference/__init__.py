"""Context-parallel inference: prefill, partial prefill and decode over a sharded KV cache.

Planning a turn needs no torch; the names that do are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp.inference.turn import STRATEGIES, plan_turn

if TYPE_CHECKING:
    from dcp.inference.attention import CachedAttention
    from dcp.inference.cache import KVCache
    from dcp.inference.engine import InferenceEngine

__all__ = ["STRATEGIES", "CachedAttention", "InferenceEngine", "KVCache", "plan_turn"]

_LAZY = {"CachedAttention": "attention", "InferenceEngine": "engine", "KVCache": "cache"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
