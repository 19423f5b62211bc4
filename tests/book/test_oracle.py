"""The oracle keeps what the world drew for a question; its boxes are where the ink is."""

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import load_questions, stable_keys
from tokensel.benchmarks.runner import evaluate
from tokensel.book.mini.oracle import DrawnScorer, OracleScorer, register_oracles
from tokensel.book.mini.suite import BENCHMARKS, asked_page, question
from tokensel.book.mini.words import SPLITS
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.data.features import Features
from tokensel.methods import Batch, methods
from tokensel.scorers import SCORERS
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm

MODEL = "data/mini/llava-next"


@pytest.fixture(scope="module")
def vlm(request):
    return load_vlm(request.config.rootpath / MODEL, device="cpu")


def inside(box, outer, slack=1.5) -> bool:
    return all(box[i] >= outer[i] - slack for i in (0, 1)) and all(box[i] <= outer[i] + slack for i in (2, 3))


@given(task=st.sampled_from(sorted(DRAW)), split=st.sampled_from(sorted(SPLITS)), index=st.integers(0, 500))
@settings(deadline=None, max_examples=60)
def test_the_evidence_is_drawn_on_the_page(task, split, index):
    page = draw_page(task, split, index)
    whole = (0, 0, *page.image.size)
    assert page.drawn and all(box in page.drawn for qa in page.questions for box in qa.evidence)
    for box in page.drawn:
        assert box[0] < box[2] and box[1] < box[3] and inside(box, whole, 8)
    for qa in page.questions:
        assert qa.evidence or qa.category == "coarse perception"


@given(split=st.sampled_from(sorted(SPLITS)), index=st.integers(0, 500))
@settings(deadline=None, max_examples=40)
def test_what_stands_in_the_evidence_is_the_answer(split, index):
    """Of a form, the letters with their middle in the evidence are those of the field and of its value."""
    from tokensel.book.mini import canvas

    glyphs = []

    class Seen(canvas.Canvas):
        def finish(self, *args, **kwargs):
            glyphs[:] = self.glyphs
            return super().finish(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokensel.book.mini.reading.Canvas", Seen)
        page = draw_page("forms", split, index)
    for qa in page.questions:
        read = "".join(
            char for char, x, y, _ in glyphs if any(a <= x <= c and b <= y <= d for a, b, c, d in qa.evidence)
        )
        key = qa.question.removeprefix("what is the ").removesuffix("?")
        assert sorted(read) == sorted(key + qa.answers[0])


@given(task=st.sampled_from(["attributes", "science", "diagrams", "mixed"]), index=st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_each_shape_is_in_a_box_of_its_page(task, index):
    page = draw_page(task, "test", index)
    pixels = np.asarray(page.image).astype(int)
    for left, top, right, bottom in page.drawn:
        cut = pixels[max(0, int(top)) : int(bottom) + 1, max(0, int(left)) : int(right) + 1]
        assert np.ptp(cut.reshape(-1, 3), axis=0).max() > 40  # there is ink in it


def ask(vlm, task: str, indices: list[int]) -> Batch:
    rows = [question(task, "test", index) for index in indices]
    questions = load_questions(BENCHMARKS[task], "test", max(indices) + 1)
    images = [questions.image(index) for index in indices]
    keys = stable_keys([row["question_id"] for row in rows])
    return Batch(vlm, images, [row["question"] for row in rows], keys)


@pytest.mark.parametrize("task", ["forms", "charts", "diagrams"])
def test_the_best_patches_are_those_under_the_evidence(vlm, task):
    batch = ask(vlm, task, [0, 1, 2])
    rows, slot, images = batch.seeing.by_image()
    scores = OracleScorer()(images)
    for image in range(3):
        page, qa = asked_page(task, "test", image)
        wide, high = page.image.size
        for token in slot[rows == image].tolist():
            y, x = (images.centre[image, token] * torch.tensor([high, wide])).tolist()
            reach = (4.0, 4.0) if images.tile[image, token] else (wide / 16, high / 16)
            touched = any(
                a < x + reach[0] - 1e-3 and c > x - reach[0] + 1e-3
                and b < y + reach[1] - 1e-3 and d > y - reach[1] + 1e-3
                for a, b, c, d in qa.evidence
            )  # fmt: skip
            if touched != bool(scores[image, token] > 0):  # a sliver, less than the thumbnail's handicap
                assert abs(float(scores[image, token])) < 2e-3


def test_a_larger_budget_grows_around_the_evidence_and_the_map_comes_first(vlm):
    batch = ask(vlm, "forms", [0])
    _, _, images = batch.seeing.by_image()
    scores = OracleScorer()(images)[0]
    covered = scores > 0
    assert 0 < int(covered.sum()) < len(scores)
    order = scores.argsort(descending=True)
    assert bool(covered[order[: int(covered.sum())]].all())
    full = scores >= 1 - 1e-6
    assert bool((images.tile[0][full] > 0).all())


def test_what_is_drawn_holds_all_evidence(vlm):
    for task in ("forms", "attributes", "describe"):
        _, _, images = ask(vlm, task, [0, 1]).seeing.by_image()
        drawn, asked = DrawnScorer()(images) > 0, OracleScorer()(images) > 0
        assert bool((drawn | ~asked).all()) and bool(drawn.any())
        assert task != "describe" or torch.equal(drawn, asked)


def test_an_oracle_answers_with_few_tokens_what_a_random_choice_does_not(request, tmp_path):
    register_oracles()
    try:
        assert {"oracle", "drawn"} <= methods().keys()
        config = EvalConfig(
            model=str(request.config.rootpath / MODEL), suite="tokensel.book.mini.suite",
            benchmarks=("forms",), methods=("oracle", "random"), keeps=(0.15,), n=24, out=str(tmp_path),
            thumbnail="last", compare=(), device="cpu",
        )  # fmt: skip
        table = evaluate(config, progress=False).table.read_text()
    finally:
        for name in ("oracle", "drawn"):
            del SCORERS[name]
    score = {row["method"]: float(row["score"]) for row in csv.DictReader(table.splitlines())}
    assert score["oracle"] > score["random"] + 0.3


def test_questions_from_elsewhere_and_features_without_places_are_one_line():
    tokens = torch.zeros(1, 4, 2)
    with pytest.raises(TokenselError, match="score an encoded batch"):
        OracleScorer()(Features(tokens))
    places = {"tile": torch.zeros(1, 4, dtype=torch.long), "centre": torch.zeros(1, 4, 2)}
    with pytest.raises(TokenselError, match="scorer 'drawn' knows the first 1000 questions"):
        DrawnScorer()(Features(tokens, keys=torch.tensor([3]), **places))
