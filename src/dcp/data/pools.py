"""The kinds of planning pools, by name."""

from __future__ import annotations

from dcp.data.planning import PlanningPool, Pool
from dcp.data.ray_pool import RayPool


def open_pool(backend: str | Pool, *, num_workers: int) -> Pool:
    """A pool by the name of its backend, or the given pool itself."""
    if backend == "processes":
        return PlanningPool(num_workers)
    if backend == "ray":
        return RayPool()
    if isinstance(backend, str) or not (hasattr(backend, "submit") and hasattr(backend, "close")):
        raise ValueError(
            f"planning_pool must be 'processes', 'ray' or an object with submit and close, "
            f"got {backend!r}"
        )
    return backend
