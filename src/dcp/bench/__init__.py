"""``dcp bench kernels``: this machine's attention kernels, measured; results carry conditions."""
