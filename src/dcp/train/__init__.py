"""``dcp train``: a configuration and DCPTrainer."""
