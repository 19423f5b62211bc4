"""How much evidence a question has, how much of it is kept, and the table that says what that costs."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from tokensel.book.mini import evidence_table
from tokensel.book.mini.evidence import COMPLETE, READ, evidence, kept_evidence
from tokensel.book.mini.suite import BENCHMARKS, asked_page
from tokensel.book.mini.world import CONTROLS, DRAW, LARGE, SIZES, draw_page
from tokensel.scorers import make_scorer
from tokensel.vlm import Choices, encode, load_vlm
from tokensel.vlm.visual import choose_tokens

MODEL = "data/mini/llava-next"


@pytest.fixture(scope="module")
def vlm(request):
    return load_vlm(request.config.rootpath / MODEL, device="cpu")


def test_tasks_that_are_read_need_all_of_it():
    read = {name for name, row in BENCHMARKS.items() if row.group == "reading"}
    assert set(COMPLETE) < set(READ) and read < set(READ) and set(READ) < {*DRAW, *CONTROLS, *LARGE}


@pytest.mark.parametrize("task", READ)
def test_what_is_read_is_the_answer_and_the_cue_is_something_else(task):
    for index in range(8):
        page, asked = asked_page(task, "test", index)
        seen = evidence(task, page, asked)
        letters = len(asked.answers[0].replace(" ", ""))
        assert 0 < seen.letters <= 6 * letters, "a letter touches up to six tokens"
        assert (seen.cue == 0) == (task in COMPLETE)
        assert max(seen.cue, seen.letters) <= seen.tokens <= seen.cue + seen.letters


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_of_the_evidence_are_those_of_the_model(vlm, size):
    """Keeping one token at a time finds as many tokens with evidence as the boxes say."""
    page = draw_page("forms", "test", 5, size)
    asked = page.questions[0]
    encoded = encode(vlm.model, vlm.inputs([page.image], [vlm.prompt(asked.question)]))
    layout, tokens = encoded.layout, evidence("forms", page, asked).tokens
    full = layout.cell.clone()
    full[layout.cell] = ~layout.thumbnail[layout.cell]
    one = torch.zeros_like(full)
    shares = []
    for place in full.nonzero()[:, 0].tolist():
        one.zero_()
        one[place] = True
        shares.append(float(kept_evidence(encoded, one, "forms", [(page, asked)])[0, 0]))
    assert sum(share > 0 for share in shares) == tokens
    assert sum(shares) == pytest.approx(1.0)
    for cells, share in ((full, 1.0), (layout.cell & ~full, 0.0)):
        assert kept_evidence(encoded, cells, "forms", [(page, asked)]).tolist() == [[share] * 3]


def test_a_question_about_the_paper_has_the_whole_page_as_evidence():
    for index in range(40):
        page, asked = asked_page("mixed", "test", index)
        if not asked.evidence:
            seen = evidence("mixed", page, asked)
            wide, high = page.image.size
            assert (seen.tokens, seen.share) == (wide // 8 * (high // 8), 1.0)
            return
    raise AssertionError("no question about the paper among 40")


def test_each_question_of_a_batch_has_its_own_share(vlm):
    asked = [asked_page("spots", "test", index) for index in range(6)]
    images, prompts = [page.image for page, _ in asked], [vlm.prompt(qa.question) for _, qa in asked]
    encoded = encode(vlm.model, vlm.inputs(images, prompts))
    choices = Choices(thumbnail="last")
    cells, _ = choose_tokens(encoded, make_scorer("norm"), 0.3, choices)
    together = kept_evidence(encoded, cells, "spots", asked)
    for number, (image, prompt) in enumerate(zip(images, prompts)):
        alone = encode(vlm.model, vlm.inputs([image], [prompt]))
        cells, _ = choose_tokens(alone, make_scorer("norm"), 0.3, choices)
        own = kept_evidence(alone, cells, "spots", asked[number : number + 1])
        assert own[0].tolist() == together[number].tolist()
        assert own[0, 0] == own[0, 1] and own[0, 2] == 1, "a colour is all cue"


def test_the_table_has_a_row_for_each_class_of_evidence_and_is_recorded_once(tmp_path, monkeypatch, request):
    root: Path = request.config.rootpath
    monkeypatch.chdir(root)
    more = {"benchmarks": ("spots",), "keeps": (0.3,), "methods": ("full", "none", "selector")}
    config = evidence_table.evidence_config(tmp_path, Path(MODEL), Path("data/mini/selector"), 6, **more)
    table = evidence_table.record_evidence(config, tmp_path / "evidence.csv", ("forms",))
    assert table is not None
    rows = pd.read_csv(table)
    assert set(rows["benchmark"]) == {"spots", "forms"}
    whole, parts = rows[rows["most"] == 0], rows[rows["most"] > 0]
    assert len(whole) == 2 * 3 and (whole["n"] == 6).all()
    for (name, method), same in parts.groupby(["benchmark", "method"]):
        row = whole[(whole["benchmark"] == name) & (whole["method"] == method)].iloc[0]
        for column in ("score", "kept", "kept_letters", "tokens", "share", "cue"):
            assert (same[column] * same["n"]).sum() / same["n"].sum() == pytest.approx(row[column], abs=1e-4)
        assert (same["tokens"] <= same["most"]).all()
    assert set(whole.loc[whole["method"] == "full", "kept"]) == {1}
    assert set(whole.loc[whole["method"] == "none", "kept"]) == {0}
    assert whole.loc[whole["method"] == "selector", "kept"].between(0.2, 1).all()
    assert set(whole.loc[whole["benchmark"] == "spots", "letters"]) == {0}
    assert (rows.loc[rows["benchmark"] == "forms", ["cue", "letters"]] > 0).all(axis=None)
    assert table.with_suffix(".provenance.json").is_file()
    before = table.read_bytes()
    monkeypatch.setattr(evidence_table, "_measured_shares", None)
    assert evidence_table.record_evidence(config, table, ("forms",)) == table
    assert table.read_bytes() == before
