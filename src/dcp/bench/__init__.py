"""Benchmarks behind ``dcp bench``: each measures, compares, and writes JSON with its conditions."""
