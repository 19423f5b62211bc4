"""Controls: benchmarks of the small world that isolate one reason for a right or wrong answer.

``words`` and ``nonsense`` are the same forms, letter for letter in the same places; the values are words in
the one and random letters in the other. Words can be guessed from some of their letters, nonsense cannot: the
difference is what the language model knows by itself.

``forms_twice`` and its like have two rows a page: the question that the suite asks about it, and one whose
answer stands elsewhere on the same page.

``full_pages`` are pages with more text than the small models were taught to transcribe: answers of 64 tokens
and more, for what changes while an answer grows.
"""

import zlib
from functools import partial
from typing import Any

import datasets
import numpy as np

from tokensel.benchmarks.table import Benchmark
from tokensel.book.mini.canvas import QA, Page
from tokensel.book.mini.suite import BENCHMARKS as SUITE
from tokensel.book.mini.suite import FEATURES, ROWS, as_row, asked_page, load, prompt
from tokensel.book.mini.world import task_seed

__all__ = ["BENCHMARKS", "TWICE", "second_question"]

TWICE = ("forms", "charts", "posters", "scene_text")
"""Tasks with several questions on a page, each with evidence of its own."""


def second_question(page: Page, first: QA, seed: list[int]) -> QA | None:
    """A question about another region of the page: its evidence shares no box with that of ``first``.

    Args:
        page: the page.
        first: a question about it.
        seed: decides among several such questions.

    Returns:
        ``None`` where there is no other region to ask about.
    """
    others = [qa for qa in page.questions if not set(qa.evidence) & set(first.evidence)]
    rng = np.random.default_rng(seed)
    return others[int(rng.integers(len(others)))] if others else None


def load_twice(task: str, split: str = "test", n: int | None = None) -> datasets.Dataset:
    """The first ``n`` rows of a task asked twice: two for each page that has a second region to ask about.

    Columns are those of the suite. The first row of a page has the id of the suite's question.
    """
    rows: list[dict[str, Any]] = []
    index, wanted = 0, n or ROWS
    while len(rows) < wanted and index < ROWS:
        page, first = asked_page(task, split, index)
        second = second_question(page, first, [zlib.crc32(b"second"), task_seed(task), index])
        if second is not None:
            name = f"{task}-{split}-{index}"
            rows += [as_row(page, first, task, name), as_row(page, second, task, f"{name}-second")]
        index += 1
    return datasets.Dataset.from_list(rows[:wanted], features=FEATURES)


def _row(name: str, like: str, loader: Any) -> Benchmark:
    return Benchmark(name, "reading", SUITE[like].metric, SUITE[like].max_new_tokens, loader, prompt)


BENCHMARKS = {
    row.name: row
    for row in (
        *(_row(task, "forms", partial(load, task)) for task in ("words", "nonsense")),
        Benchmark("full_pages", "long", "similarity", 96, partial(load, "full_pages"), prompt),
        *(_row(f"{task}_twice", task, partial(load_twice, task)) for task in TWICE),
    )
}
