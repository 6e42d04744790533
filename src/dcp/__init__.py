"""Dynamic context parallelism: attention over many devices, planned anew for every batch.

Planning needs no torch. The names that do are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dcp.batch import AttentionSpec, SequenceBatch
from dcp.cluster import Cluster
from dcp.masks import AttnMask
from dcp.placement import StrategyError
from dcp.planner import Planner, plan
from dcp.plans import Plan
from dcp.program import RankPlan

if TYPE_CHECKING:
    from dcp.data import DCPDataLoader, PlanningError
    from dcp.runtime import AttentionExecutor, DCPAttention, LocalWorld

__version__ = "0.1.0"

__all__ = [
    "AttentionExecutor",
    "AttentionSpec",
    "AttnMask",
    "Cluster",
    "DCPAttention",
    "DCPDataLoader",
    "LocalWorld",
    "Plan",
    "Planner",
    "PlanningError",
    "RankPlan",
    "SequenceBatch",
    "StrategyError",
    "plan",
]

_LAZY = {
    "AttentionExecutor": "dcp.runtime",
    "DCPAttention": "dcp.runtime",
    "DCPDataLoader": "dcp.data",
    "LocalWorld": "dcp.runtime",
    "PlanningError": "dcp.data",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
