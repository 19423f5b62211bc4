"""Large things and growing evidence: pages, shares, and words that a small model knows."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from tokensel.book.mini.evidence import COMPLETE, evidence
from tokensel.book.mini.large_suite import BENCHMARKS
from tokensel.book.mini.model import build_tokenizer
from tokensel.book.mini.suite import BENCHMARKS as SUITE
from tokensel.book.mini.suite import asked_page
from tokensel.book.mini.train import halve
from tokensel.book.mini.words import SPLITS
from tokensel.book.mini.world import CONTROLS, DRAW, LARGE, draw_page

# of the questions and answers of pages 0 to 19 in train, validation and test: the benchmarks may never change
DRAWN = {
    "objects": "35eab50b61ba779c",
    "patterns": "c414716422f798b8",
    "larger": "013b42a0b3126614",
    "scenes": "bc13e2eea69e2369",
    "spots": "cf7c311ad09bfcb1",
    "strings": "dbd000a17e89c4a0",
}


def test_large_tasks_are_benchmarks_of_their_own():
    assert list(BENCHMARKS) == list(LARGE)
    assert LARGE.keys().isdisjoint(DRAW) and LARGE.keys().isdisjoint(CONTROLS)
    assert BENCHMARKS.keys().isdisjoint(SUITE)


@pytest.mark.parametrize("task", LARGE)
def test_the_large_tasks_are_drawn_as_ever(task):
    asked = [
        [qa.question, qa.answers, qa.category, qa.options, qa.evidence]
        for split in SPLITS
        for index in range(20)
        for qa in draw_page(task, split, index).questions
    ]
    assert hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16] == DRAWN[task]


@settings(deadline=None, max_examples=60)
@given(task=st.sampled_from(sorted(LARGE)), split=st.sampled_from(SPLITS), index=st.integers(0, 500))
def test_the_evidence_is_ink_inside_the_page(task, split, index):
    page = draw_page(task, split, index)
    pixels, (wide, high) = np.asarray(page.image).astype(int), page.image.size
    for qa in page.questions:
        assert qa.evidence and all(box in page.drawn for box in qa.evidence)
        for left, top, right, bottom in qa.evidence:
            assert 0 <= left < right <= wide and 0 <= top < bottom <= high
            cut = pixels[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            outside = np.delete(pixels.reshape(-1, 3), slice(None, None, 2), axis=0)
            paper = np.median(outside, axis=0)
            assert np.abs(cut - paper).sum(-1).max() > 60, "something is drawn in it"


@settings(deadline=None, max_examples=40)
@given(task=st.sampled_from(sorted(LARGE)), index=st.integers(0, 300))
def test_the_small_models_know_the_words(task, index):
    tokenizer = build_tokenizer()
    for qa in draw_page(task, "train", index).questions:
        ids = tokenizer(" ".join([qa.question, *qa.answers, *qa.options])).input_ids
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("task", ["objects", "patterns", "larger", "scenes"])
def test_large_things_take_up_5_to_25_percent_of_the_page(task):
    shares = []
    for index in range(60):
        page, asked = asked_page(task, "test", index)
        shown = np.zeros(page.image.size, bool)
        for left, top, right, bottom in asked.evidence:
            shown[int(left) : round(right), int(top) : round(bottom)] = True
        shares.append(shown.mean())
    assert np.quantile(shares, 0.1) > 0.045 and np.quantile(shares, 0.9) < 0.27


@pytest.mark.parametrize("task, least, most", [("spots", 2, 100), ("strings", 3, 60)])
def test_evidence_grows_from_a_token_or_two_to_much_of_the_page(task, least, most):
    seen = [evidence(task, *asked_page(task, "test", index)) for index in range(150)]
    tokens = np.array([one.tokens for one in seen])
    assert tokens.min() <= least and tokens.max() >= most
    assert all((one.letters > 0) == (task in COMPLETE) for one in seen)
    # and all sizes between: each doubling has its part
    counts = np.histogram(np.log2(tokens), np.arange(2, 7))[0]
    assert counts.min() >= 5


def test_no_longer_string_of_the_test_split_is_drawn_in_training():
    def written(split):
        pages = (draw_page("strings", split, index) for index in range(200))
        return {part for page in pages for part in page.questions[0].answers[0].split() if len(part) > 3}

    assert written("test").isdisjoint(written("train"))


def test_lines_of_a_string_do_not_overlap():
    for index in range(80):
        page = draw_page("strings", "train", index)
        assert all(above[3] <= below[1] for above, below in zip(page.drawn, page.drawn[1:]))


def test_the_larger_of_two_is_clearly_larger():
    for index in range(40):
        page = draw_page("larger", "test", index)
        sides = sorted(right - left for left, _, right, _ in page.drawn)
        assert len(sides) == 2 and sides[1] >= 1.3 * sides[0] - 1e-6


def test_a_model_in_half_of_the_space_loads_as_before_and_keeps_its_tower(tmp_path, request):
    shipped = request.config.rootpath / "data" / "mini" / "llava-next"
    folder = Path(shutil.copytree(shipped, tmp_path / "model"))
    halve(folder)
    assert (folder / "model.safetensors").stat().st_size < 0.7 * (
        shipped / "model.safetensors"
    ).stat().st_size
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (shipped, folder))
    for name, tensor in before.state_dict().items():
        stored = after.state_dict()[name]
        assert stored.dtype == torch.float32
        if "vision_tower" in name:
            assert torch.equal(stored, tensor)
        else:
            torch.testing.assert_close(stored, tensor, rtol=2**-8, atol=0)
