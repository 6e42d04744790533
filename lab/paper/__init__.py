"""The paper's experiments: lengths, simulated and measured runs, and the commands that draw them.

Each experiment is a list of cases and a function that measures one; rows are kept as CSV, so that
what was run is not run again. ``python -m lab figures`` runs what is missing and draws everything.
"""
