"""Confidence intervals by bootstrap over questions, all columns at once, and means over benchmarks."""

from functools import reduce

import numpy as np
from jaxtyping import Float, Shaped

from tokensel.utils.errors import needs

with needs("eval"):
    import pandas as pd

__all__ = ["LEVEL", "RESAMPLES", "average", "bootstrap", "trend"]

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 4_000_000  # resamples x questions in memory at a time


def bootstrap(
    scores: Float[np.ndarray, "questions columns"],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    strata: Shaped[np.ndarray, "questions"] | None = None,
) -> tuple[Float[np.ndarray, "columns"], Float[np.ndarray, "columns"], Float[np.ndarray, "columns"]]:
    """Mean and percentile interval of each column of ``scores``.

    Questions are drawn with replacement, the same draw for every column: columns stay paired, so the interval
    of a column of differences is that of a paired comparison (Efron & Tibshirani, *An Introduction to the
    Bootstrap*, 1993).

    Args:
        scores: one column for each condition, or for each difference of two.
        resamples: how many times the questions are drawn.
        level: mass of the interval.
        seed: fixes the draws; the same scores give the same interval on every machine.
        strata: the class of each question, where the score is the mean of the classes' means; questions are
            then drawn within their class.

    Returns:
        ``mean``, ``low``, ``high``, each ``[columns]``. One question, or equal scores, give an interval of
        length 0.
    """
    scores = np.asarray(scores, dtype=np.float64)
    parts = [scores] if strata is None else [scores[strata == name] for name in np.unique(strata)]
    rng = np.random.default_rng(seed)
    means = reduce(np.add, [_resample(part, resamples, rng) for part in parts]) / len(parts)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return reduce(np.add, [part.mean(axis=0) for part in parts]) / len(parts), low, high


def _resample(
    scores: Float[np.ndarray, "questions columns"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples columns"]:
    """The mean of each column over questions drawn with replacement, ``resamples`` times."""
    questions, columns = scores.shape
    means = np.empty((resamples, columns))
    step = max(1, _CELLS // questions)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(questions, size=(rows, questions))
        # counts[r, q]: how often resample r drew question q; its mean is then one row of a matrix product
        cells = drawn + np.arange(rows)[:, None] * questions
        counts = np.bincount(cells.ravel(), minlength=rows * questions).reshape(rows, questions)
        means[start : start + rows] = counts.astype(np.float64) @ scores / questions
    return means


def trend(
    values: Float[np.ndarray, "steps"],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How far the least-squares line through a series rises from its first step to its last.

    Steps are drawn with replacement, each with its place, so that noise may differ along the series; what is
    left of the noise from one step to the next is taken as independent (Efron & Tibshirani 1993, ch. 9).

    Args:
        values: one number a step, three steps or more.
        resamples: how many times the steps are drawn.
        level: mass of the interval.
        seed: fixes the draws.

    Returns:
        The rise and the ends of its percentile interval. A series is flat as far as the interval says: it
        contains 0, and its ends are small.
    """
    values = np.asarray(values, dtype=np.float64)
    place = np.arange(len(values)) - (len(values) - 1) / 2

    def rise(counts: Float[np.ndarray, "draws steps"]) -> Float[np.ndarray, "draws"]:
        mean_place, mean_value = counts @ place / len(values), counts @ values / len(values)
        slope = (counts @ (place * values) / len(values) - mean_place * mean_value) / (
            counts @ place**2 / len(values) - mean_place**2
        )
        return slope * (len(values) - 1)

    drawn = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), size=resamples
    )
    tail = (1 - level) / 2
    low, high = np.quantile(rise(drawn.astype(np.float64)), [tail, 1 - tail])
    return float(rise(np.ones((1, len(values))))[0]), float(low), float(high)


def average(table: pd.DataFrame, by: str | list[str]) -> pd.DataFrame:
    """Mean score over the benchmarks of each group of rows, with half the width of its 95 % interval.

    The intervals of benchmarks combine as those of independent means do, since no question belongs to two of
    them. Several rows of one benchmark, such as those of several seeds, answer the same questions: the mean
    of their widths is taken, which is never too narrow for their mean.

    Args:
        table: the long table of results, scores 0..1, see :data:`tokensel.benchmarks.results.TABLE`.
        by: the columns that name a group.

    Returns:
        ``score`` and ``reach``, 0 to 100, one row for each group in the table's order.
    """
    names = [by] if isinstance(by, str) else by
    rows = table.assign(reach=50 * (table["ci_high"] - table["ci_low"]), score=100 * table["score"])
    each = rows.groupby([*names, "benchmark"], sort=False).agg(
        score=("score", "mean"), reach=("reach", "mean")
    )
    groups = (
        each.assign(reach=each["reach"] ** 2)
        .groupby(by, sort=False)
        .agg(score=("score", "mean"), reach=("reach", "sum"), n=("score", "size"))
    )
    return pd.DataFrame({"score": groups["score"], "reach": groups["reach"] ** 0.5 / groups["n"]})
