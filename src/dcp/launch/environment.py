"""What a child process is given, so that it finds what its parent found."""

from __future__ import annotations

import os
import sys


def child_environment(**variables: str) -> dict[str, str]:
    """This process's environment for a child, with ``variables`` set in it.

    Its ``PYTHONPATH`` is this process's ``sys.path``: a child imports the same dcp, wherever it
    came from.
    """
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in sys.path))
    return os.environ | {"PYTHONPATH": path} | variables
