"""``dcp train``: a Llama-architecture model on variable-length documents, context-parallel.

:func:`add_arguments` and :func:`run` are the command's; nothing here imports torch before the
configuration is known to be good.
"""

from dcp.train.command import add_arguments, run
from dcp.train.config import TrainConfig

__all__ = ["TrainConfig", "add_arguments", "run"]
