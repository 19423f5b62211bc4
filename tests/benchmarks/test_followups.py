"""Two questions on one cache, as rows of a table."""

from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from suite_tiny import BENCHMARKS, COLUMNS, page

from tokensel.benchmarks.followups import TURN_COLUMNS, TURNS, follow_up_rows, question_pairs
from tokensel.benchmarks.questions import load_questions
from tokensel.benchmarks.session import EvalSession
from tokensel.vlm import reduce_inputs

IMAGES = [1, 1, 2, 3, 3, 3, 3, 4, 2]


def load(split: str, n: int | None) -> Dataset:
    rows = [
        {"image": page(image), "question": f"what{'?' * i}", "answers": ["cat", "[a]"], "options": []}
        for i, image in enumerate(IMAGES)
    ]
    named = [row | {"question_id": f"q{i}"} for i, row in enumerate(rows)]
    return Dataset.from_list(named[:n], features=COLUMNS)


@pytest.fixture
def questions():
    return load_questions(replace(BENCHMARKS["page"], load=load), "test", None)


def test_neighbours_about_the_same_image_are_pairs(questions):
    assert question_pairs(questions) == [(0, 1), (3, 4), (5, 6)]


def test_rows_are_the_means_of_both_answers_and_of_their_difference(config, questions):
    config = replace(config, methods=("full", "norm", "fastv"), keeps=(0.4,), layer=1, batch_size=2)
    session = EvalSession(config)
    found = list(follow_up_rows(session, questions, question_pairs(questions)))
    assert [rows[0]["method"] for rows in found] == ["full", "norm", "fastv"]
    for rows in found:
        assert [row["turn"] for row in rows] == list(TURNS) and {row["n"] for row in rows} == {3}
        assert all(set(row) == set(TURN_COLUMNS) for row in rows)
        first, second, difference = (row["score"] for row in rows)
        assert difference == pytest.approx(second - first)
        assert all(row["ci_low"] <= row["score"] <= row["ci_high"] for row in rows)
    # the first answers are those that are given to the first questions alone
    vlm, scores = session.vlm, []
    for one, _ in question_pairs(questions):
        inputs = vlm.inputs([questions.image(one)], [vlm.prompt(questions.prompts[one])])
        text = vlm.generate(reduce_inputs(vlm.model, inputs), questions.benchmark.max_new_tokens)[0]
        scores.append(questions.score(one, text))
    assert found[0][0]["score"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert list(follow_up_rows(session, questions, [])) == []
