"""Data-centric parallelism: profile once, then let the data choose each iteration's configuration.

After VideoSys's Data-Centric Parallel. The choice (``profile`` to ``schedule``) knows no torch.
"""
