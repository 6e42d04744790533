"""Data-centric parallelism: profile once, then let the data choose each iteration's configuration.

After VideoSys's Data-Centric Parallel. The choice (``profile`` to ``schedule``) knows no torch; the
public names, which do, are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcp.datacentric.config import DataCentricArguments
    from dcp.datacentric.diffusers import DiffusersWorkload, split_transformer
    from dcp.datacentric.splitting import SharedTokens, split_tokens
    from dcp.datacentric.trainer import DataCentricTrainer
    from dcp.datacentric.workload import Workload

__all__ = [
    "DataCentricArguments",
    "DataCentricTrainer",
    "DiffusersWorkload",
    "SharedTokens",
    "Workload",
    "split_tokens",
    "split_transformer",
]

_LAZY = {
    "DataCentricArguments": "config",
    "DataCentricTrainer": "trainer",
    "DiffusersWorkload": "diffusers",
    "SharedTokens": "splitting",
    "Workload": "workload",
    "split_tokens": "splitting",
    "split_transformer": "diffusers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
