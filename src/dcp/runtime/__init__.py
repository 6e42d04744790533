"""Plans at work: executors, communicators, kernels."""

from dcp.runtime.executor import AttentionExecutor, DCPAttention, LocalWorld

__all__ = ["AttentionExecutor", "DCPAttention", "LocalWorld"]
