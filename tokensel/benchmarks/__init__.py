"""Benchmarks: tables of questions, metrics, the resumable runner, the long table with its intervals."""

from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.table import GROUPS, Benchmark, load_suite

__all__ = ["GROUPS", "METRICS", "Benchmark", "load_suite"]
