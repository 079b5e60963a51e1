"""Benchmarks, a module for each suite."""

SUITES = (
    *(
        "ablation",
        "compute",
        "dashboard",
        "faults",
        "gpu",
        "head",
        "hop",
        "load",
        "network",
        "open",
    ),
    *("paced", "policies", "sampling", "shard", "ttft", "widgets"),
)
"""The modules, each with a function ``run_SUITE_bench``."""
