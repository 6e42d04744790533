"""Data-centric parallelism: profile once, then let the data choose each iteration's configuration.

After VideoSys's Data-Centric Parallel. The planners (``profile`` to ``schedule``) import no torch.
"""
