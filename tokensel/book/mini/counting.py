"""How a shortened image changes what the small model counts: errors with their sign.

A score says how often a count is right. Whether the model counts too many or too few says why it is wrong.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from tokensel.benchmarks.metrics import parse_option
from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini.canvas import QA, Page
from tokensel.book.mini.suite import asked_page
from tokensel.scorers import Scorer, make_scorer
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import command_line, environment
from tokensel.vlm import Vlm, encode, load_vlm, reduce

__all__ = ["SETTINGS", "counting_errors", "record_counting", "summary"]

TASK = "science"  # its questions: how many of these are a star?
_LAST = {"thumbnail": "last"}
# What is done to the image. Blanks in the places of dropped tokens give a shortened prompt its old length,
# and the biases give its kept tokens the attention of as many.
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {
    **{f"{keep:g} kept": (keep, _LAST) for keep in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "page without thumbnail": (1.0, {"thumbnail": "drop"}),
    "all tokens": (1.0, _LAST),
    "0.3 kept, blanks between": (0.3, _LAST | {"dropped": "blank"}),
    "0.3 kept, proportional": (0.3, _LAST | {"attention": "proportional"}),
    "0.3 kept, uniform": (0.3, _LAST | {"attention": "uniform"}),
}


def counting_errors(
    vlm: Vlm,
    scorer: Scorer,
    settings: Mapping[str, tuple[float, dict[str, Any]]],
    n: int,
    split: str = "test",
    batch_size: int = 20,
    progress: bool = False,
) -> pd.DataFrame:
    """Ask the small world's first ``n`` counting questions under each setting.

    Args:
        vlm: the small model, or another that answers with the letter of an option.
        scorer: ranks the tokens.
        settings: a keep and fields of :class:`~tokensel.vlm.choose.Choices` for each name.
        n: questions.
        split: of the small world.
        batch_size: questions at a time; changes the speed, not the answers.
        progress: whether to show a bar.

    Returns:
        A row for each question, a column for each setting: the count in the answer minus the right one, NaN
        where the answer names no option.
    """
    errors: dict[str, list[float]] = {name: [] for name in settings}
    for start in tqdm(range(0, n, batch_size), desc="counting", disable=not progress):
        rows = [asked_page(TASK, split, index) for index in range(start, min(n, start + batch_size))]
        encoded = encode(vlm.model, _inputs(vlm, rows))
        for name, (keep, choices) in settings.items():
            answers = vlm.generate(reduce(encoded, scorer, keep, **choices), max_new_tokens=8)
            errors[name] += [_error(answer, asked) for answer, (_, asked) in zip(answers, rows)]
    return pd.DataFrame(errors)


def _inputs(vlm: Vlm, rows: Sequence[tuple[Page, QA]]) -> Any:
    return vlm.inputs([page.image for page, _ in rows], [vlm.prompt(asked.question) for _, asked in rows])


def _error(answer: str, asked: QA) -> float:
    """The count that an answer names minus the right one; NaN where it names none."""
    counts = dict(zip(ascii_uppercase, map(int, asked.options)))
    named = parse_option(answer, asked.options)
    return float(counts[named] - counts[asked.answers[0]]) if named else float("nan")


def summary(errors: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row for each setting: the mean error with its 95 % interval, and the shares that are right, too many,
    too few and without a count."""
    rows = []
    for name in errors:
        known = errors[name].dropna().to_numpy()
        mean, low, high = (float(part[0]) for part in bootstrap(known[:, None], seed=seed))
        share = {
            "right": np.mean(errors[name] == 0),
            "too many": np.mean(errors[name] > 0),
            "too few": np.mean(errors[name] < 0),
            "no count": np.mean(errors[name].isna()),
        }
        rows.append({"setting": name, "error": mean, "ci_low": low, "ci_high": high, **share})
    return pd.DataFrame(rows).assign(n=len(errors))


def record_counting(model: Path, selector: Path, table: Path, n: int = 400, split: str = "test") -> Path:
    """Record :func:`summary` under all :data:`SETTINGS`, with its provenance as JSON beside it."""
    vlm = load_vlm(model, device="cpu")
    scorer = make_scorer("selector", selector=str(selector))
    errors = counting_errors(vlm, scorer, SETTINGS, n, split, progress=True)
    write_text(table, summary(errors).to_csv(index=False, float_format="%.6g"))
    asked = {"n": n, "split": split, "task": TASK, "model": str(model), "selector": str(selector)}
    write_json(
        table.with_suffix(".provenance.json"),
        environment(torch.device("cpu")) | {"questions": asked, "command": command_line()},
    )
    return table
