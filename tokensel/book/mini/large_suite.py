"""The tasks of :mod:`tokensel.book.mini.large` as benchmarks, for models that have been taught them.

*large*: general questions whose evidence takes up 5 to 25 % of the page, as in GQA and MMStar. *evidence*:
two tasks in which it grows from one token on; of the one any part suffices, of the other all is needed.
"""

from functools import partial

from tokensel.benchmarks.table import Benchmark
from tokensel.book.mini.suite import load, prompt

__all__ = ["BENCHMARKS"]


def _row(task: str, group: str, metric: str, max_new_tokens: int) -> Benchmark:
    return Benchmark(task, group, metric, max_new_tokens, partial(load, task), prompt)


BENCHMARKS = {
    row.name: row
    for row in (
        _row("objects", "general", "exact_match", 4),  # as GQA
        _row("patterns", "general", "exact_match", 4),
        _row("larger", "general", "option_letter", 4),  # as MMStar
        _row("scenes", "general", "option_letter", 4),
        _row("spots", "general", "exact_match", 4),
        _row("strings", "reading", "exact_match", 64),
    )
}
