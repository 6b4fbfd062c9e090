"""Modules of `second_order_gain.py`: tasks, networks, one run, many runs, statistics, tables."""
