"""The small world as benchmarks: ten tasks in the columns of the real ones, one question a page."""

import io
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import datasets
import numpy as np

from tokensel.benchmarks.table import Benchmark
from tokensel.book.mini.canvas import QA, Page
from tokensel.book.mini.world import draw_page, task_seed

ROWS = 1000  # of a split by default; any number can be drawn
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "question_id": datasets.Value("string"),
        "task": datasets.Value("string"),
        "category": datasets.Value("string"),
        "options": datasets.List(datasets.Value("string")),
    }
)


def asked_page(task: str, split: str, index: int) -> tuple[Page, QA]:
    """Page ``index`` of a task and the question about it, all categories on the page equally likely."""
    page = draw_page(task, split, index)
    rng = np.random.default_rng([zlib.crc32(b"question"), task_seed(task), index])
    kinds = sorted({qa.category for qa in page.questions})
    kind = kinds[int(rng.integers(len(kinds)))]
    asked = [qa for qa in page.questions if qa.category == kind]
    return page, asked[int(rng.integers(len(asked)))]


def question(task: str, split: str, index: int) -> dict[str, Any]:
    """Row ``index`` of a task, in the columns of the benchmarks."""
    page, qa = asked_page(task, split, index)
    return as_row(page, qa, task, f"{task}-{split}-{index}")


def as_row(page: Page, qa: QA, task: str, name: str) -> dict[str, Any]:
    """A question about a page in the columns of the benchmarks; ``name`` is its id."""
    file = io.BytesIO()
    page.image.save(file, "PNG")
    return {
        "image": {"bytes": file.getvalue(), "path": None},
        "question": qa.question,
        "answers": qa.answers,
        "question_id": name,
        "task": task,
        "category": qa.category,
        "options": qa.options,
    }


def load(task: str, split: str = "test", n: int | None = None) -> datasets.Dataset:
    """The first ``n`` questions of a task's split (default 1000) as a ``datasets.Dataset``.

    Columns: ``image``, ``question``, ``answers``, ``question_id``, ``task``, ``category``, ``options`` (empty
    where the answer is free).
    """
    rows = [question(task, split, index) for index in range(n or ROWS)]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def prompt(row: Mapping[str, Any]) -> str:
    """The question unchanged: the small model was trained without further instructions."""
    return row["question"]


def _row(task: str, group: str, metric: str, max_new_tokens: int) -> Benchmark:
    return Benchmark(task, group, metric, max_new_tokens, partial(load, task), prompt)


BENCHMARKS = {
    row.name: row
    for row in (
        _row("forms", "reading", "anls", 8),  # as DocVQA
        _row("charts", "reading", "relaxed_accuracy", 8),  # as ChartQA
        _row("posters", "reading", "anls", 8),  # as InfoVQA
        _row("scene_text", "reading", "vqa_accuracy", 8),  # as TextVQA
        _row("attributes", "general", "exact_match", 4),  # as GQA
        _row("science", "general", "option_letter", 4),  # as ScienceQA
        _row("diagrams", "general", "option_letter", 4),  # as AI2D
        _row("mixed", "general", "option_letter", 4),  # as MMStar
        _row("transcribe", "long", "similarity", 64),
        _row("describe", "long", "item_f1", 24),
    )
}
