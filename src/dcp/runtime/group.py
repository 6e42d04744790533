"""Which processes work together: one rule for every ``group`` argument of the library."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def resolve_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group meant by ``group``; None for a process alone.

    Args:
        group: a ``torch.distributed`` group or a mesh of one axis; None means the default group
            where ``torch.distributed`` is initialised, else this process alone.

    Raises ``ValueError`` for a mesh of more than one axis.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"a mesh of {group.ndim} axes {group.mesh_dim_names or ''} is not one group: "
                "give the axis that shares attention, mesh[name] or mesh.get_group(axis)"
            )
        return group.get_group()
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group
