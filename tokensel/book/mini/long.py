"""The tasks with long answers as a suite of their own: what changes while an answer is generated."""

from tokensel.book.mini.controls import BENCHMARKS as CONTROLS
from tokensel.book.mini.suite import BENCHMARKS as SUITE

BENCHMARKS = {row.name: row for row in (*SUITE.values(), *CONTROLS.values()) if row.group == "long"}
