"""A count for each image against the same share of every image, at equal mean cost.

Two rules give an image as many tokens as it needs: one threshold for the selector's scores, and one for
the expected error of the reconstruction. Each is run first; the mean share that it comes to is then given to
every image alike. The table has the paired difference, on all pages, on the fuller half and on the emptier
half.
"""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import load_questions
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
    rows: list[dict[str, Any]] = []
    digest = " ".join(map(checkpoint_digest, paths.values()))
    with as_method(expected, digest) as by_error:
        for rule, method in (("score", "selector"), ("expected error", by_error)):
            for keep in SHARES:
                options = {"selector": paths["selector"], "name": "counts"}
                place = folder / "counts" / f"{method}-{keep:g}"
                rule_options = options | {"methods": (method,), "budget": "threshold"}
                own = _answered(choices, keep, place / "own", **rule_options)
                share = float(np.mean(own["share"]))
                options |= {"methods": ("selector",), "budget": "image"}
                fixed = _answered(choices, round(share, 4), place / "fixed", **options)
                rows += [
                    {"rule": rule, "keep": keep, "share": share} | compared
                    for compared in _compared(own.assign(score_fixed=fixed["score"]))
                ]
    return pd.DataFrame(rows)


def drawn_share(page: Page) -> float:
    """How much of a page is drawn on: the share of its 4-pixel squares that a box of it touches."""
    width, height = page.image.size
    marked = np.zeros((-(-height // 4), -(-width // 4)), dtype=bool)
    for left, top, right, bottom in page.drawn:
        marked[int(top // 4) : int(bottom // 4) + 1, int(left // 4) : int(right // 4) + 1] = True
    return float(marked.mean())


def _answered(choices: dict[str, Any], keep: float, out: Path, **options: Any) -> pd.DataFrame:
    """A row for each question: its score, the share of its tokens that were kept, how full its page is."""
    own = {"keeps": (keep,), "out": str(out), "compare": ()}
    run = EvalConfig.from_dict(choices | options | own)
    evaluate(run)
    rows = {}
    for name, benchmark in run.suite_benchmarks().items():
        questions = load_questions(benchmark, run.split, run.n)
        number = {identity: i for i, identity in enumerate(questions.ids)}
        for path in (out / "records" / name).rglob("*.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                place = number.get(record["question_id"])
                if place is None:
                    continue
                index = int(record["question_id"].rsplit("-", 1)[1])
                rows[record["question_id"]] = {
                    "task": name,
                    "group": benchmark.group,
                    "score": 100 * questions.score(place, record["prediction"]),
                    "share": record["n_visual"] / record["n_visual_full"],
                    "full": drawn_share(asked_page(name, run.split, index)[0]),
                }
    return pd.DataFrame.from_dict(rows, orient="index").sort_index()


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
