"""Controls of the small world: nonsense in the place of words, and a second question about a page."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.benchmarks.followups import question_pairs
from tokensel.benchmarks.questions import load_questions
from tokensel.book.mini.controls import BENCHMARKS, TWICE, second_question
from tokensel.book.mini.long import BENCHMARKS as LONG
from tokensel.book.mini.oracle import OracleScorer, _questions
from tokensel.book.mini.suite import BENCHMARKS as SUITE
from tokensel.book.mini.suite import asked_page
from tokensel.book.mini.words import SPLITS, VOWELS, belongs, nonsense
from tokensel.book.mini.world import CONTROLS, DRAW, draw_page


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 500))
def test_nonsense_stands_where_the_words_stand(split, index):
    (words, one), (random, two) = (asked_page(task, split, index) for task in ("words", "nonsense"))
    assert words.image.size == random.image.size and words.drawn == random.drawn
    assert [(qa.question, qa.category, qa.evidence) for qa in words.questions] == [
        (qa.question, qa.category, qa.evidence) for qa in random.questions
    ]
    assert one.question == two.question
    for word, text in ((a.answers[0], b.answers[0]) for a, b in zip(words.questions, random.questions)):
        assert text == nonsense(word, split) != word and len(text) == len(word) and belongs(text, split)
        kinds = "".join("v" if letter in VOWELS else "c" for letter in text)
        assert "vv" in kinds or "cc" in kinds, "it is no word"
    # apart from letters the pages are the same, pixel by pixel
    differs = np.any(np.asarray(words.image) != np.asarray(random.image), axis=2)
    for left, top, right, bottom in words.drawn:
        differs[int(top) : int(bottom) + 1, int(left) : int(right) + 1] = False
    assert not differs.any()


def test_letters_of_nonsense_are_about_equally_frequent():
    letters = "".join(nonsense(f"{i}"[:5].rjust(5, "A"), "train") for i in range(3000))
    share = np.unique(list(letters), return_counts=True)[1] / len(letters)
    assert len(share) == 24 and share.max() < 1.4 / 24 and share.min() > 0.6 / 24


def test_controls_are_drawn_by_no_training_and_no_sweep():
    assert CONTROLS.keys().isdisjoint(DRAW) and CONTROLS.keys().isdisjoint(SUITE)
    assert BENCHMARKS.keys().isdisjoint(SUITE)
    for task in CONTROLS:
        assert draw_page(task, "test", 0).questions


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(SPLITS), st.integers(0, 500))
def test_a_full_page_has_a_long_answer(split, index):
    page, asked = asked_page("full_pages", split, index)
    (answer,) = asked.answers
    assert 64 <= len(answer) <= 70 and len(page.drawn) == len(answer.split())
    lines = sorted({(top, bottom) for _, top, _, bottom in page.drawn})
    assert all(above[1] <= below[0] for above, below in pairwise(lines)), "no line touches another"
    assert list(LONG) == ["transcribe", "describe", "full_pages"]


@pytest.mark.parametrize("task", TWICE)
def test_the_second_question_is_about_another_region(task):
    rows = BENCHMARKS[f"{task}_twice"].load("test", 20)
    names = list(rows["question_id"])
    for one, two in zip(names[::2], names[1::2], strict=True):
        assert two == f"{one}-second"
        page, first = asked_page(task, "test", int(one.rsplit("-", 1)[1]))
        row, other = (rows[names.index(name)] for name in (one, two))
        assert (row["question"], row["answers"]) == (first.question, first.answers)
        (asked,) = [qa for qa in page.questions if qa.question == other["question"]]
        assert asked.answers == other["answers"] and not set(asked.evidence) & set(first.evidence)
    questions = load_questions(BENCHMARKS[f"{task}_twice"], "test", 20)
    assert question_pairs(questions) == [(i, i + 1) for i in range(0, 20, 2)]


def test_a_page_with_one_region_has_no_second_question():
    page, first = asked_page("describe", "test", 0)
    assert second_question(page, first, [0]) is None
    assert question_pairs(load_questions(SUITE["forms"], "test", 4)) == []


def test_the_oracle_knows_the_controls():
    known = {task for task, _, _ in _questions().values()}
    assert {*DRAW, *CONTROLS} == known and OracleScorer.name == "oracle"
