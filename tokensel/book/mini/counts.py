"""A count for each image against the same share of every image, at equal mean cost.

Two rules give an image as many tokens as it needs: one threshold for the selector's scores, and one for
the expected error of the reconstruction. Each is run first; the mean share that it comes to is then given to
every image alike. The table has the paired difference, on all pages, on the fuller half and on the emptier
half.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.recorded import recorded_answers
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini.canvas import Page
from tokensel.book.mini.expected_error import ExpectedErrorScorer, as_method
from tokensel.book.mini.suite import asked_page
from tokensel.data.features import Features
from tokensel.model.reconstructor import TokenReconstructor
from tokensel.model.selector import TokenSelector
from tokensel.training.metrics import Metric
from tokensel.utils.provenance import checkpoint_digest

__all__ = ["SHARES", "compare_counts", "drawn_share"]

SHARES = (0.1, 0.2, 0.3, 0.5)  # on the tiles of the training; what they come to on the questions is measured


def compare_counts(choices: dict[str, Any], folder: Path, features: Features, metric: Metric) -> pd.DataFrame:
    """Run both rules and the equal shares that belong to them.

    Args:
        choices: fields of ``EvalConfig``: model, suite, benchmarks, number of questions and split.
        folder: holds the ``selector`` and the ``reconstructor``; answers are written below ``counts`` in it.
        features: tiles on which the expected error gets its thresholds.
        metric: where the two were trained to be close.

    Returns:
        Columns ``rule``, ``keep`` (asked for), ``share`` (measured, of all pages), ``group``, ``pages`` (all,
        full, empty), ``score``, ``fixed`` (the score at an equal share), ``kept`` (by the rule on these
        pages), ``difference``, ``ci_low``, ``ci_high`` (0 to 100), ``n``.
    """
    paths = {part: str(folder / part) for part in ("selector", "reconstructor")}
    selector = TokenSelector.from_pretrained(paths["selector"])
    reconstructor = TokenReconstructor.from_pretrained(paths["reconstructor"])
    expected = ExpectedErrorScorer(selector, reconstructor, metric)
    expected.calibrate(features)
    choices = choices | {"selector": paths["selector"], "out": str(folder / "counts"), "name": "counts"}
    fullness = _fullness(EvalConfig.from_dict(choices))
    rows: list[dict[str, Any]] = []
    digest = " ".join(map(checkpoint_digest, paths.values()))
    with as_method(expected, digest) as by_error:
        for rule, method in (("score", "selector"), ("expected error", by_error)):
            for keep in SHARES:
                own = _answered(choices, keep, method, "threshold")
                share = float(np.mean(own["share"]))
                fixed = _answered(choices, round(share, 4), "selector", "image")
                rows += [
                    {"rule": rule, "keep": keep, "share": share} | compared
                    for compared in _compared(own.assign(score_fixed=fixed["score"], full=fullness))
                ]
    return pd.DataFrame(rows)


def _fullness(config: EvalConfig) -> list[float]:
    """How full the page of each question is, in the order of the answers."""
    return [
        drawn_share(asked_page(task, config.split, index)[0])
        for task in config.suite_benchmarks()
        for index in range(config.n or 0)
    ]


def drawn_share(page: Page) -> float:
    """How much of a page is drawn on: the share of its 4-pixel squares that a box of it touches."""
    width, height = page.image.size
    marked = np.zeros((-(-height // 4), -(-width // 4)), dtype=bool)
    for left, top, right, bottom in page.drawn:
        marked[int(top // 4) : int(bottom // 4) + 1, int(left // 4) : int(right // 4) + 1] = True
    return float(marked.mean())


def _answered(choices: dict[str, Any], keep: float, method: str, budget: str) -> pd.DataFrame:
    """A row for each question, in order: task, group, score, and the share of its tokens that was kept."""
    own = {"keeps": (keep,), "methods": (method, "full"), "budget": budget, "compare": ()}
    run = EvalConfig.from_dict(choices | own)
    evaluate(run)
    parts = []
    for answers in recorded_answers(run):
        chosen, full = (next(c for c in answers.work if c.method == name) for name in (method, "full"))
        kept, all_tokens = ([work["visual"] for work in answers.work[c]] for c in (chosen, full))
        rows = {"score": 100 * answers.table.scores[chosen], "share": np.divide(kept, all_tokens)}
        named = {"task": answers.benchmark.name, "group": answers.benchmark.group}
        parts.append(pd.DataFrame(rows).assign(**named))
    return pd.concat(parts, ignore_index=True)


def _compared(questions: pd.DataFrame) -> list[dict[str, Any]]:
    """Both scores and their paired difference, on the tasks of each group."""
    middle = questions["full"].median()
    halves = {"all": questions["full"] > -1, "full": questions["full"] > middle}
    halves["empty"] = ~halves["full"]
    rows = []
    for group in questions["group"].unique():
        for pages, chosen in halves.items():
            part = cast(pd.DataFrame, questions[chosen & (questions["group"] == group)])
            gain = np.asarray(part["score"] - part["score_fixed"])[:, None]
            # the mean of the tasks' means, as in every table here
            (difference,), (low,), (high,) = bootstrap(gain, strata=np.asarray(part["task"]))
            names = {"score": "score", "score_fixed": "fixed", "share": "kept"}
            means = cast(pd.DataFrame, part.groupby("task")[list(names)].mean()).mean()
            rows.append(
                {"group": group, "pages": pages}
                | {name: float(np.asarray(means[column])) for column, name in names.items()}
                | {"difference": difference, "ci_low": low, "ci_high": high, "n": len(part)}
            )
    return rows
