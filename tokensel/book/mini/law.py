"""The law of evidence: how often an answer is right, from the tokens of its evidence and what is kept.

Evidence has two parts: a cue, of which any token will do, and letters, which are read one by one. Of each a
share is kept. Each token of the cue tells it with a chance of its own; so many of the letters' tokens are
indispensable, and each is kept with a chance of its own. The form was chosen on the validation split: there a
further constant for how many tokens of a letter suffice, or a power of the tokens, fitted no better.
"""

from dataclasses import dataclass, fields
from itertools import product
from typing import Any, cast

import numpy as np
import pandas as pd
from jaxtyping import Float

__all__ = ["WHOLE", "Law", "cases", "fit_law", "held_back"]

WHOLE = ("larger", "scenes", "science", "diagrams", "mixed", "describe")
"""Tasks that compare things or judge a page as a whole. The law says nothing about them."""
_STEPS = (2.0, 1.3, 1.1, 1.03, 1.01)  # factors by which the search changes a constant, coarse to fine


@dataclass(frozen=True)
class Law:
    """Two constants of a model.

    Attributes:
        tells: b, independent chances that one token of a cue gives.
        needs: a, tokens that are indispensable, for each token of letters.
    """

    tells: float = 0.3
    needs: float = 0.2

    def seen(self, cue, kept_cue, letters, kept_letters) -> Float[np.ndarray, "..."]:
        """The chance that what is kept shows the answer.

        Args:
            cue: tokens of the cue; 0: there is none to be found.
            kept_cue: the share of them that is kept, 0 to 1.
            letters: tokens of what is read; 0: nothing.
            kept_letters: the share of them that is kept.
        """
        cue, kept_cue, letters, kept_letters = (
            np.asarray(each, float) for each in (cue, kept_cue, letters, kept_letters)
        )
        found = np.where(cue > 0, 1 - (1 - kept_cue) ** (self.tells * cue), 1.0)
        return np.asarray(found * kept_letters ** (self.needs * letters))

    def score(self, rows: pd.DataFrame | dict[str, np.ndarray]) -> Float[np.ndarray, "rows"]:
        """Predicted scores, 0 to 1, of the rows of :func:`cases`."""
        seen = self.seen(rows["cue"], rows["kept_cue"], rows["letters"], rows["kept_letters"])
        return np.asarray(rows["none"] + (rows["full"] - rows["none"]) * seen)


def cases(table: pd.DataFrame) -> pd.DataFrame:
    """What is to be predicted: the rows of each class of evidence under each method and budget.

    Benchmarks of :data:`WHOLE` are left out.

    Args:
        table: of :func:`~tokensel.book.mini.evidence_table.evidence_rows`.

    Returns:
        These rows with ``none`` and ``full``: the scores of their questions without the image and with all
        tokens, between which a prediction lies.
    """
    table = cast(pd.DataFrame, table[(table["most"] > 0) & ~table["benchmark"].isin(WHOLE)])
    ends = cast(pd.DataFrame, table[table["method"].isin(["none", "full"])])
    ends = ends.pivot(index=["benchmark", "most"], columns="method", values="score").reset_index()
    return cast(pd.DataFrame, table[~table["method"].isin(["none", "full"])]).merge(
        ends, on=["benchmark", "most"]
    )


def fit_law(rows: pd.DataFrame) -> Law:
    """The constants with the least squared error on rows of :func:`cases`, each as heavy as its questions.

    They are multiplied and divided, together and one by one, as long as that helps.
    """
    law, columns = Law(), {str(name): column.to_numpy() for name, column in rows.items()}

    def error(one: Law) -> float:
        return float(np.average((one.score(columns) - columns["score"]) ** 2, weights=columns["n"]))

    names = [field.name for field in fields(law)]
    for step in _STEPS:
        best = None
        while best is not law:
            best = law
            moves = product((1.0, step, 1 / step), repeat=len(names))  # staying is the first of them
            tried = [{name: move * getattr(law, name) for name, move in zip(names, row)} for row in moves]
            law = min([law, *(Law(**constants) for constants in tried[1:])], key=error)
    return law


def held_back(rows: pd.DataFrame) -> pd.DataFrame:
    """Each benchmark as the law predicts it that was fitted on all others.

    Args:
        rows: from :func:`cases`, of at least two benchmarks.

    Returns:
        A row for each benchmark, method and budget: ``score`` and ``predicted``, means over its questions.
    """
    parts = []
    for name in rows["benchmark"].unique():
        here = rows["benchmark"] == name
        own, others = cast(pd.DataFrame, rows[here]), cast(pd.DataFrame, rows[~here])
        parts.append(own.assign(predicted=fit_law(others).score(own)))
    means: list[dict[str, Any]] = []
    for key, part in pd.concat(parts).groupby(["benchmark", "method", "keep"], sort=False):
        weights = part["n"].to_numpy()
        scores = {c: float(np.average(part[c].to_numpy(), weights=weights)) for c in ("score", "predicted")}
        names = dict(zip(("benchmark", "method", "keep"), cast(tuple, key)))
        means.append(names | scores | {"n": int(weights.sum())})
    return pd.DataFrame(means)
