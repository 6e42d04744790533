"""What passes through the environment: from a launcher (torchrun's, or ours) to a rank, and from a
process to its children."""

from __future__ import annotations

import os
import sys


def is_launched() -> bool:
    """Whether this process is a rank that a launcher started.

    Raises ``ValueError`` for variables that no launcher sets so.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    size = _variable("WORLD_SIZE", least=1)
    here = _variable("LOCAL_WORLD_SIZE", least=1, most=size)
    _variable("RANK", most=size - 1)
    _variable("LOCAL_RANK", most=here - 1)
    _variable("MASTER_PORT", most=65535)
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR is not set: start ranks by torchrun, or unset RANK")
    return True


def _variable(name: str, *, least: int = 0, most: int = 1 << 31) -> int:
    """A whole number of the environment."""
    text = os.environ.get(name, "")
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(
            f"the environment has {name}={text!r}, which must be a number from {least} to {most}: "
            "start ranks by torchrun, or unset RANK"
        )
    return int(text)


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
