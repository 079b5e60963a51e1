"""Benchmarks, a module for each suite."""

SUITES = (
    *(
        "ablation",
        "cancels",
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
    *("paced", "policies", "sampling", "shard", "soak", "ttft", "widgets"),
)
"""The modules, each with a function ``run_SUITE_bench``."""
