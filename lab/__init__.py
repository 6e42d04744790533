"""The laboratory, ``python -m lab`` from a checkout: what proves the library.

Benchmarks, a testbed of shaped links, the experiments of the paper, and figures drawn from them.
"""
