"""Training a model with planned attention, context-parallel: configuration and loop.

Nothing here imports torch before the configuration is known to be good.
"""

from dcp.train.config import TrainConfig

__all__ = ["TrainConfig"]
