"""From scores to tables: a row for each condition, a row for each paired difference, with intervals."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokensel.benchmarks.statistics import bootstrap
from tokensel.benchmarks.table import Benchmark
from tokensel.errors import TokenselError
from tokensel.io import write_text

TABLE = (
    "model", "benchmark", "group", "method", "keep", "metric", "score", "ci_low", "ci_high", "n", "seed",
    "flops", "kv_bytes",
)  # fmt: skip
DIFFERENCES = (
    "model", "benchmark", "group", "method", "against", "keep", "metric",
    "difference", "ci_low", "ci_high", "n", "seed",
)  # fmt: skip
Row = dict[str, str | float | int]


@dataclass(frozen=True, order=True)
class Condition:
    """How a question was asked: which method chose tokens, what fraction it kept, with which seed."""

    method: str
    keep: float
    seed: int


Scores = dict[Condition, Sequence[float] | np.ndarray]
"""Scores of one benchmark: for each condition one score a question, the questions in one order throughout."""


def score_rows(
    model: str, benchmark: Benchmark, scores: Scores, flops: Scores, kv_bytes: Scores, *, seed: int = 0
) -> list[Row]:
    """Rows of the long table for one benchmark, in the order of ``scores``; ``seed`` fixes the bootstrap.

    Args:
        model: its name in the table.
        benchmark: which one.
        scores: of every question.
        flops: of every question; the table has their mean.
        kv_bytes: bytes of keys and values of every question, likewise.
        seed: of the bootstrap.
    """
    if not scores:
        return []
    columns = np.array(list(scores.values()), dtype=np.float64).T
    mean, low, high = bootstrap(columns, seed=seed)
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
            "flops": float(np.mean(flops[condition])),
            "kv_bytes": float(np.mean(kv_bytes[condition])),
        }
        for i, condition in enumerate(scores)
    ]


def difference_rows(
    model: str, benchmark: Benchmark, scores: Scores, pairs: Iterable[tuple[str, str]], *, seed: int = 0
) -> list[Row]:
    """Paired differences ``method - against``, question by question, at each keep of ``method``.

    Several seeds of a method are averaged within each question first, so that the interval speaks of
    questions. A method with one row only (``full``, ``none``) is compared at every keep of the other, and one
    written ``method@keep`` takes part with that keep alone.
    """
    names, columns = [], []
    for method, against in pairs:
        ours_name, ours_keep = _named(method)
        their_name, their_keep = _named(against)
        found = dict.fromkeys(c.keep for c in scores if c.method == ours_name)
        for keep in found if ours_keep is None else [k for k in found if k == ours_keep]:
            ours, ours_seeds = _over_seeds(scores, ours_name, keep)
            theirs, their_seeds = _over_seeds(scores, their_name, keep if their_keep is None else their_keep)
            if theirs is not None:
                names.append((method, against, keep, " ".join(map(str, sorted({*ours_seeds, *their_seeds})))))
                columns.append(ours - theirs)
    if not columns:
        return []
    mean, low, high = bootstrap(np.stack(columns, axis=1), seed=seed)
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


def _named(side: str) -> tuple[str, float | None]:
    """``"fastv@0.3"`` -> ``("fastv", 0.3)``; without a keep ``None`` stands for it."""
    method, at, keep = side.partition("@")
    return method, float(keep) if at else None


def parse_pairs(pairs: Iterable[str]) -> list[tuple[str, str]]:
    """``["selector:random"]`` -> ``[("selector", "random")]``; either side may name its keep, as ``fastv@0.3``.

    Raises:
        TokenselError: an entry is not two names with a colon between, or a keep is no number.
    """
    parsed = [tuple(pair.split(":")) for pair in pairs]
    for pair, parts in zip(pairs, parsed):
        if len(parts) != 2 or not all(parts):
            raise TokenselError(
                f"compare is {pair!r}: give two methods with a colon between, such as selector:random"
            )
        for side in parts:
            try:
                _named(side)
            except ValueError:
                raise TokenselError(f"compare is {pair!r}: give a number behind @, such as fastv@0.3") from None
    return parsed


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
