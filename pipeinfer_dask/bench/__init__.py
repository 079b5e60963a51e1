"""Benchmarks, a module for each suite."""

SUITES = (
    *("ablation", "head", "hop", "network", "open", "paced", "policies", "sampling", "shard"),
    "ttft",
)
"""The modules, each with a function ``run_SUITE_bench``."""
