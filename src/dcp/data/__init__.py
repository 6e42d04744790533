"""Documents, token-budget batches, planning ahead, and the loader that joins them.

Names are handed on lazily: the planning worker imports this package and must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "ByteTokenizer": "tokenizers",
    "PretrainedTokenizer": "tokenizers",
    "Documents": "sources",
    "open_documents": "sources",
    "TokenDataset": "datasets",
    "as_dataset": "datasets",
    "SampleFormat": "samples",
    "open_records": "records",
    "ChatSamples": "chat",
    "open_chat": "chat",
    "PreferencePairs": "preferences",
    "SharedPromptMasks": "preferences",
    "answers_to": "preferences",
    "open_preferences": "preferences",
    "gather_samples": "gathering",
    "scatter_samples": "gathering",
    "TokenBudgetBatches": "batching",
    "Pool": "pool",
    "PlanningPool": "pool",
    "PlanningError": "messages",
    "PoolLost": "messages",
    "ModalityMasks": "multimodal",
    "DCPDataLoader": "loader",
    "LocalBatch": "reading",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dcp.data.{_HOMES[name]}"), name)
