"""Metrics against hand-worked cases and against properties that any score must have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensel.benchmarks.metrics import METRICS, normalize_vqa, parse_option

ANLS, RELAXED, VQA, EXACT, LETTER, SIMILARITY, ITEMS = list(METRICS.values())[:7]
texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=20)


@pytest.mark.parametrize("name", METRICS)
@given(prediction=texts, answers=st.lists(texts, max_size=4))
def test_scores_lie_between_0_and_1_and_no_answer_scores_0(name, prediction, answers):
    score = METRICS[name](prediction, answers)
    assert 0.0 <= score <= 1.0
    assert METRICS[name](prediction, []) == 0.0


@pytest.mark.parametrize("name", [name for name in METRICS if "letter" not in name and name != "mmmu_answer"])
@given(answers=st.lists(texts.filter(str.strip), min_size=1, max_size=3))
def test_an_answer_repeated_word_for_word_is_right(name, answers):
    assert METRICS[name](answers[0], answers) == 1.0


@given(prediction=texts, answers=st.lists(texts, min_size=1, max_size=4))
def test_more_accepted_answers_never_lower_a_score(prediction, answers):
    for metric in (ANLS, RELAXED, EXACT, SIMILARITY, ITEMS):
        assert metric(prediction, answers) >= metric(prediction, answers[:1])


def test_anls_is_one_minus_the_distance_over_the_longer_text():
    assert ANLS("abcd", ["abcx"]) == 0.75
    assert ANLS("ABCD  e", ["abcd e"]) == 1.0
    assert ANLS("abcdefgh", ["abcd"]) == 0.5  # just at the threshold
    assert ANLS("abcdefghi", ["abcd"]) == 0.0  # below it
    assert ANLS("abcx", ["zzzz", "abcd"]) == 0.75  # the best of the answers
    assert ANLS("", ["abc"]) == 0.0


def test_anls_divides_by_the_raw_length_as_lmms_eval_does():
    assert ANLS("ab   cd", ["ab xd"]) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("12%", "12.3%", 1),
        ("0.12", "12%", 1),
        ("12", "12%", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # no 5 % of nothing: compared as text
        ("Yes", "yes", 1),
        ("yess", "yes", 0),
        ("nan", "3", 0),
        ("NaN", "nan", 1),
        ("Infinity", "infinity", 1),
        ("%", "3", 0),
        ("2019", "2020", 1),  # years too, which the metric is known for
    ],
)
def test_relaxed_accuracy(prediction, answer, score):
    assert RELAXED(prediction, [answer]) == score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("U.S.A.", "usa"),
        ("stop.", "stop"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("well-known", "well known"),
        ("what?!", "what"),
        ("the dog's", "dog 's"),
        ("a\tb\nc", "b c"),
        ("thats", "that's"),
        ("im", "im"),
        ("10", "10"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, normal):
    assert normalize_vqa(text) == normal


def test_vqa_accuracy_leaves_each_person_out():
    ten = ["two"] * 2 + ["three"] * 8
    # for the 2 who said it one other remains (1/3), for the 8 others both (2/3)
    assert VQA("2", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert VQA("3", ten) == 1.0
    assert VQA("The 3.", ten) == 1.0
    assert VQA("four", ten) == 0.0
    assert VQA("3", ["three"] * 4 + ["x"] * 6) == 1.0
    assert VQA("3", ["three"] + ["x"] * 9) == pytest.approx(9 * (1 / 3) / 10)


def test_vqa_accuracy_with_too_few_answers_for_three_others():
    assert VQA("two", ["2"]) == 1.0
    assert VQA("one", ["2", "three"]) == 0.0


def test_exact_match_ignores_case_and_punctuation_only():
    assert EXACT(" Left. ", ["left"]) == 1
    assert EXACT("t-shirt", ["T-Shirt!"]) == 1
    assert EXACT("left side", ["left"]) == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(C)", "C"),
        ("B.", "B"),
        ("B. moon", "B"),
        ("B) moon", "B"),
        ("A: sun", "A"),
        ("moon", "B"),
        ("Moon!", "B"),
        ("The answer is C", "C"),
        ("the answer is (A).", "A"),
        ("Answer: B", "B"),
        ("option C because", "C"),
        ("E", None),  # beyond the last option
        ("Apples", None),
        ("I think so", None),
        ("", None),
        ("?", None),
    ],
)
def test_option_letters(text, letter):
    assert parse_option(text, ["sun", "moon", "star", "sea"]) == letter


def test_option_metric_accepts_letters_and_texts_as_answers():
    options = ["sun", "moon"]
    assert LETTER("B", ["moon"], options) == 1
    assert LETTER("moon", ["B"], options) == 1
    assert LETTER("A. sun", ["B"], options) == 0
    assert LETTER("nothing", ["B"], options) == 0
    assert LETTER("D.", ["D"]) == 1
    assert LETTER("same", ["A"], ["same", "same"]) == 0  # two options alike: the text names neither


def test_similarity_counts_characters():
    assert SIMILARITY("abcd\nefgh", ["abcd efgh"]) == 1.0
    assert SIMILARITY("abcd efgh", ["abcd efgx"]) == pytest.approx(8 / 9)
    assert SIMILARITY("ABCD", ["abcd"]) == 0.0


def test_item_f1_is_a_multiset_in_any_order():
    assert ITEMS("red circle, blue square", ["Blue square, red circle"]) == 1.0
    assert ITEMS("red circle", ["red circle, blue square"]) == pytest.approx(2 / 3)
    assert ITEMS("red circle", ["red circle, red circle"]) == pytest.approx(2 / 3)
    assert ITEMS("red circle, red circle", ["red circle"]) == pytest.approx(2 / 3)
    assert ITEMS("", ["red circle"]) == 0.0
