"""What passes through the environment: from a launcher (torchrun's, or ours) to a rank, and from a
process to its children."""

from __future__ import annotations

import os
import sys


def is_launched() -> bool:
    """Whether this process is a rank that a launcher started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_world_size(default: int) -> int:
    """Ranks on this machine; ``default`` where no launcher has said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a child, with ``variables`` set in it.

    Its ``PYTHONPATH`` is this process's ``sys.path``: a child imports the same dcp, wherever it
    came from.
    """
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
    return os.environ | {"PYTHONPATH": path} | variables
