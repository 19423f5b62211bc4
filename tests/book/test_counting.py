"""Counting with its sign: what an answer is worth, and what a table says of it."""

import math
from pathlib import Path

import pandas as pd
import pytest

from tokensel.book.mini import counting
from tokensel.book.mini.canvas import QA
from tokensel.scorers import make_scorer
from tokensel.vlm import load_vlm

ROOT = Path(__file__).parents[2]


def test_an_answer_is_too_many_too_few_or_no_count():
    asked = QA("how many of these are a star? A. 3 B. 1 C. 4", ["B"], "counting", ["3", "1", "4"])
    assert [counting._error(answer, asked) for answer in ("B", "A", "C.", "4")] == [0, 2, 3, 3]
    assert math.isnan(counting._error("many", asked))
    table = counting.summary(pd.DataFrame({"half": [0.0, 1.0, -1.0, 3.0, math.nan]})).iloc[0]
    assert (table["error"], table["n"]) == (0.75, 5)
    assert list(table[["right", "too many", "too few", "no count"]]) == pytest.approx([0.2, 0.4, 0.2, 0.2])
    assert table["ci_low"] < 0.75 < table["ci_high"]


def test_what_is_counted_does_not_depend_on_the_batch():
    vlm = load_vlm(ROOT / "data" / "mini" / "llava-next", device="cpu")
    settings = {name: counting.SETTINGS[name] for name in ("0.1 kept", "all tokens")}
    few, many = (
        counting.counting_errors(vlm, make_scorer("norm"), settings, 5, "validation", batch_size=size)
        for size in (2, 5)
    )
    pd.testing.assert_frame_equal(few, many)
    assert few.shape == (5, 2) and (few["all tokens"] == 0).sum() >= 3
