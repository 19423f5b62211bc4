"""Recorded answers, question by question, and the difficult ones among them."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.benchmarks.recorded import difficult, difficult_rows, joined, recorded_answers
from tokensel.benchmarks.runner import evaluate
from tokensel.utils.errors import TokenselError


def test_what_is_read_is_what_the_tables_average(config):
    config = replace(config, methods=("full", "norm", "downsample", "fastv"), keeps=(0.3,), layer=1)
    with pytest.raises(TokenselError, match="answers are missing"):
        recorded_answers(config)
    done = evaluate(config, progress=False)
    written = {
        (row["benchmark"], row["method"]): float(row["score"])
        for row in csv.DictReader(done.table.read_text().splitlines())
    }
    answers = recorded_answers(config)
    assert len(answers) == 3
    for part in answers:
        tokens = {}
        for condition, scores in part.table.scores.items():
            assert written[part.benchmark.name, condition.method] == pytest.approx(scores.mean(), abs=1e-5)
            tokens[condition.method] = part.mean_tokens(condition)
            assert (part.ranking_rows(condition) > 0) == (condition.method == "fastv")
        # fastv's first layer reads everything
        assert tokens["norm"] < tokens["fastv"] < tokens["full"]

    small = next(c for c in answers[0].table.scores if c.method == "downsample")
    full = next(c for c in answers[0].table.scores if c.method == "full")
    # the tiny model answers nonsense: the bar is set where a question is difficult
    pairs = [pair for part in answers for pair in zip(part.table.scores[full], part.table.scores[small])]
    right = max(one for one, two in pairs if one > two)
    rows = difficult_rows("tiny", answers, small, right=right)
    assert rows and {row["method"] for row in rows} == {"norm", "fastv"}
    for part in answers:
        scores = part.table.scores
        chosen = [i for i in range(9) if scores[full][i] >= right > scores[small][i]]
        found = [row for row in rows if row["benchmark"] == part.benchmark.name]
        assert len(found) == (2 if chosen else 0)
        for row in found:
            condition = next(c for c in scores if c.method == row["method"])
            assert row["n"] == len(chosen) and row["score"] == pytest.approx(scores[condition][chosen].mean())
    alone = [recorded_answers(replace(config, methods=methods)) for methods in (("full", "norm"), ("fastv",))]
    for part, whole in zip(joined(alone), answers, strict=True):
        assert [c.method for c in part.table.scores] == ["full", "norm", "fastv"]
        assert all((part.table.scores[c] == whole.table.scores[c]).all() for c in part.table.scores)
        assert part.work == {c: whole.work[c] for c in part.work} and len(part.work) == 3
    for other in ([], [answers, answers[:1]], [answers, recorded_answers(replace(config, n=4))]):
        with pytest.raises(TokenselError, match="other questions"):
            joined(other)
    with pytest.raises(TokenselError, match=r"downsample at keep 0\.7"):
        difficult_rows("tiny", answers, replace(small, keep=0.7))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=20), st.floats(0.01, 1))
def test_a_question_is_difficult_if_only_the_whole_image_answers_it(pairs, right):
    full, small = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    marks = difficult(full, small, right)
    assert marks.tolist() == [one >= right and two < right for one, two in pairs]
    assert not difficult(full, full, right).any(), "a smaller image that answers the same leaves nothing"
