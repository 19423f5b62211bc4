"""From scores to tables: a row for each condition, a row for each paired difference, with intervals."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokensel.benchmarks.conditions import Condition, split_keep
from tokensel.benchmarks.statistics import bootstrap
from tokensel.benchmarks.table import Benchmark
from tokensel.utils.files import write_text

TABLE = (
    "model", "benchmark", "group", "method", "keep", "metric", "score", "ci_low", "ci_high", "n", "seed",
    "flops", "kv_bytes",
)  # fmt: skip
CATEGORIES = (*TABLE[:3], "category", *TABLE[3:-2])
DIFFERENCES = (
    "model", "benchmark", "group", "method", "against", "keep", "metric",
    "difference", "ci_low", "ci_high", "n", "seed",
)  # fmt: skip
Row = dict[str, str | float | int]


Scores = dict[Condition, Sequence[float] | np.ndarray]
"""Scores of one benchmark: for each condition one score a question, the questions in one order throughout."""
Costs = dict[Condition, tuple[float, float]]
"""FLOPs and bytes of keys and values of an answer under each condition, means over the questions."""


@dataclass(frozen=True)
class Sheet:
    """The scores of one benchmark as they are averaged, see ``Benchmark.aggregate``.

    Attributes:
        scores: for each condition one score a question; rows of which all must be right are one question here.
        strata: the class of each question where the score is the mean of the classes' means, else ``None``.
        categories: what each question is about; "" where the benchmark does not say.
    """

    scores: Scores
    strata: np.ndarray | None
    categories: np.ndarray

    @classmethod
    def of(
        cls, benchmark: Benchmark, scores: Scores, clusters: Sequence[str], categories: Sequence[str]
    ) -> "Sheet":
        """From one score a row, in the benchmark's order."""
        columns = {condition: np.asarray(each, dtype=np.float64) for condition, each in scores.items()}
        names = np.asarray(categories)
        if benchmark.aggregate != "all":
            return cls(columns, np.asarray(clusters) if benchmark.aggregate == "macro" else None, names)
        _, first, circle = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)

        def worst(column: np.ndarray) -> np.ndarray:
            out = np.ones(len(first))
            np.minimum.at(out, circle, column)
            return out

        return cls({condition: worst(column) for condition, column in columns.items()}, None, names[first])

    def by_category(self) -> "dict[str, Sheet]":
        """The same for each category, by name."""

        def part(rows: np.ndarray) -> Sheet:
            scores = {condition: column[rows] for condition, column in self.scores.items()}
            return Sheet(scores, None if self.strata is None else self.strata[rows], self.categories[rows])

        return {str(name): part(self.categories == name) for name in np.unique(self.categories) if name}


def category_rows(model: str, benchmark: Benchmark, sheet: Sheet, *, seed: int = 0) -> list[Row]:
    """As :func:`score_rows`, for each category of the benchmark's questions."""
    return [
        {**row, "category": name}
        for name, part in sheet.by_category().items()
        for row in score_rows(model, benchmark, part.scores, seed=seed, strata=part.strata)
    ]


def score_rows(
    model: str,
    benchmark: Benchmark,
    scores: Scores,
    costs: Costs | None = None,
    *,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> list[Row]:
    """Rows of the long table for one benchmark, in the order of ``scores``.

    Args:
        model: its name in the table.
        benchmark: which one.
        scores: of every question.
        costs: what an answer took under each condition.
        seed: of the bootstrap.
        strata: class of each question where the score is the mean of the classes' means.
    """
    if not scores:
        return []
    columns = np.array(list(scores.values()), dtype=np.float64).T
    mean, low, high = bootstrap(columns, seed=seed, strata=strata)
    return [
        {
            "model": model,
            "benchmark": benchmark.name,
            "group": benchmark.group,
            "method": condition.method,
            "keep": condition.keep,
            "metric": benchmark.metric,
            "score": mean[i],
            "ci_low": low[i],
            "ci_high": high[i],
            "n": len(columns),
            "seed": condition.seed,
        }
        | (dict(zip(("flops", "kv_bytes"), costs[condition])) if costs else {})
        for i, condition in enumerate(scores)
    ]


def difference_rows(
    model: str,
    benchmark: Benchmark,
    scores: Scores,
    pairs: Iterable[tuple[str, str]],
    *,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> list[Row]:
    """Paired differences ``method - against``, question by question, at each keep of ``method``.

    Several seeds of a method are averaged within each question first, so that the interval speaks of
    questions. A method with one row only (``full``, ``none``) is compared at every keep of the other, and one
    written ``method@keep`` takes part with that keep alone.
    """
    names, columns = [], []
    for method, against in pairs:
        ours_name, ours_keep = split_keep(method)
        their_name, their_keep = split_keep(against)
        found = dict.fromkeys(c.keep for c in scores if c.method == ours_name)
        for keep in found if ours_keep is None else [k for k in found if k == ours_keep]:
            ours, ours_seeds = _over_seeds(scores, ours_name, keep)
            theirs, their_seeds = _over_seeds(scores, their_name, keep if their_keep is None else their_keep)
            if theirs is not None:
                names.append((method, against, keep, " ".join(map(str, sorted({*ours_seeds, *their_seeds})))))
                columns.append(ours - theirs)
    if not columns:
        return []
    mean, low, high = bootstrap(np.stack(columns, axis=1), seed=seed, strata=strata)
    return [
        {
            "model": model,
            "benchmark": benchmark.name,
            "group": benchmark.group,
            "method": method,
            "against": against,
            "keep": keep,
            "metric": benchmark.metric,
            "difference": mean[i],
            "ci_low": low[i],
            "ci_high": high[i],
            "n": len(columns[0]),
            "seed": seeds,
        }
        for i, (method, against, keep, seeds) in enumerate(names)
    ]


def _over_seeds(scores: Scores, method: str, keep: float) -> tuple[np.ndarray | None, list[int]]:
    mine = [c for c in scores if c.method == method]
    if len({c.keep for c in mine}) > 1:
        mine = [c for c in mine if c.keep == keep]
    if not mine:
        return None, []
    return np.mean([scores[c] for c in mine], axis=0, dtype=np.float64), [c.seed for c in mine]


def write_table(path: str | Path, rows: Iterable[Row], columns: Sequence[str] = TABLE) -> Path:
    """Write rows as CSV, atomically; fractions with six digits, so that equal results are equal bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        )
    return write_text(path, text.getvalue())
