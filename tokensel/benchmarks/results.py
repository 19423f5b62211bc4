"""From scores to tables: a row for each condition, a row for each paired difference, with intervals."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokensel.benchmarks.conditions import Condition, split_keep
from tokensel.benchmarks.statistics import bootstrap
from tokensel.benchmarks.table import Benchmark
from tokensel.utils.files import write_text

__all__ = [
    "CATEGORIES",
    "DIFFERENCES",
    "TABLE",
    "Costs",
    "Row",
    "ScoreTable",
    "Scores",
    "category_rows",
    "difference_rows",
    "score_rows",
    "write_table",
]

_BENCHMARK = ("model", "benchmark", "group")
_INTERVAL = ("ci_low", "ci_high", "n", "seed")
TABLE = (*_BENCHMARK, "method", "keep", "metric", "score", *_INTERVAL, "flops", "kv_bytes")
CATEGORIES = (*_BENCHMARK, "category", "method", "keep", "metric", "score", *_INTERVAL)
DIFFERENCES = (*_BENCHMARK, "method", "against", "keep", "metric", "difference", *_INTERVAL)
Row = dict[str, Any]


Scores = Mapping[Condition, Sequence[float] | np.ndarray]
"""Scores of one benchmark: for each condition one score a question, in the same order of questions."""
Costs = Mapping[Condition, tuple[float, float]]
"""FLOPs and bytes of keys and values of an answer under each condition, averaged over the questions."""


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one benchmark in the form in which they are averaged, see ``Benchmark.aggregate``.

    Attributes:
        scores: for each condition one score a question; rows that all have to be right are one question here.
        strata: the class of each question where the score is the mean of the classes' means, else ``None``.
        categories: what each question is about; "" where the benchmark does not say.
    """

    scores: dict[Condition, np.ndarray]
    strata: np.ndarray | None
    categories: np.ndarray

    @classmethod
    def of(
        cls, benchmark: Benchmark, scores: Scores, clusters: Sequence[str], categories: Sequence[str]
    ) -> "ScoreTable":
        """From one score for each row of the benchmark, in its order."""
        columns = {condition: np.asarray(column, dtype=np.float64) for condition, column in scores.items()}
        names = np.asarray(categories)
        if benchmark.aggregate != "all":
            return cls(columns, np.asarray(clusters) if benchmark.aggregate == "macro" else None, names)
        # cluster[i] is the number of row i's cluster, first[j] the first row of cluster j
        _, first, cluster = np.unique(np.asarray(clusters), return_index=True, return_inverse=True)

        def worst(column: np.ndarray) -> np.ndarray:
            lowest = np.ones(len(first))
            np.minimum.at(lowest, cluster, column)
            return lowest

        return cls({condition: worst(column) for condition, column in columns.items()}, None, names[first])

    def by_category(self) -> "dict[str, ScoreTable]":
        """The part of each category, by the category's name."""

        def part(rows: np.ndarray) -> ScoreTable:
            scores = {condition: column[rows] for condition, column in self.scores.items()}
            strata = None if self.strata is None else self.strata[rows]
            return ScoreTable(scores, strata, self.categories[rows])

        return {str(name): part(self.categories == name) for name in np.unique(self.categories) if name}


def category_rows(model: str, benchmark: Benchmark, table: ScoreTable, *, seed: int = 0) -> list[Row]:
    """As :func:`score_rows`, for each category of the benchmark's questions."""
    return [
        {**row, "category": name}
        for name, part in table.by_category().items()
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
        benchmark: the benchmark.
        scores: those of every question.
        costs: the mean cost of an answer under each condition.
        seed: seed of the bootstrap.
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

    Several seeds of a method are averaged within each question first, so that the interval covers the choice
    of questions. A method with one row only (``full``, ``none``) is compared at every keep of the other. A
    method written ``method@keep`` takes part with that keep alone.
    """
    names, columns = [], []
    for method, against in pairs:
        our_name, our_keep = split_keep(method)
        their_name, their_keep = split_keep(against)
        keeps = dict.fromkeys(c.keep for c in scores if c.method == our_name)
        for keep in keeps if our_keep is None else [k for k in keeps if k == our_keep]:
            ours, our_seeds = _mean_over_seeds(scores, our_name, keep)
            theirs, their_seeds = _mean_over_seeds(
                scores, their_name, keep if their_keep is None else their_keep
            )
            if ours is not None and theirs is not None:
                names.append((method, against, keep, " ".join(map(str, sorted({*our_seeds, *their_seeds})))))
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


def _mean_over_seeds(scores: Scores, method: str, keep: float) -> tuple[np.ndarray | None, list[int]]:
    """Scores of ``method`` at ``keep``, averaged over its seeds, and the seeds; ``None`` if not run."""
    chosen = [c for c in scores if c.method == method]
    if len({c.keep for c in chosen}) > 1:
        chosen = [c for c in chosen if c.keep == keep]
    if not chosen:
        return None, []
    return np.mean([scores[c] for c in chosen], axis=0, dtype=np.float64), [c.seed for c in chosen]


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
