"""What a launcher (torchrun's, or ours) tells a rank through the environment."""

from __future__ import annotations

import os


def local_world_size(default: int) -> int:
    """Ranks on this machine; ``default`` where no launcher has said."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))
