"""The explorer's dictionary, the page made of it, and the live one, with a tiny model."""

import copy
import io
import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import WIDTH, noise_image, tiny_selector, tiny_vlm

from tokensel.book.explorer import Example, Exploration, embed, generation_steps
from tokensel.book.explorer.live import OWN, LiveExplorer
from tokensel.figures import style
from tokensel.schedules import Exponential, FastV, Vtw
from tokensel.scorers import make_scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm, reduce_inputs

EXAMPLES = [
    Example("wide", noise_image(24, 48, 1), "what</script>?", ("x",)),
    Example("high", noise_image(100, 20, 2), "who?"),
]


@pytest.fixture(scope="module")
def parts():
    style.use()
    torch.manual_seed(0)
    judge = MaskedAutoencoder.new(WIDTH, layers=1, heads=4).eval()
    scorers = {"selector": make_scorer("selector", selector=tiny_selector()), "random": make_scorer("random")}
    return tiny_vlm(), EXAMPLES, scorers, judge


@pytest.fixture(scope="module")
def exploration(parts):
    return Exploration(*parts, max_new_tokens=4)


@pytest.fixture(scope="module")
def data(exploration):
    return exploration.data([0.25, 0.5, 1.0], progress=False)


def test_kept_cells_are_those_that_reach_the_model(data):
    for shown in data["examples"]:
        tiles = shown["tiles"][0] * shown["tiles"][1]
        assert [view["rows"] * view["columns"] for view in shown["views"]] == [36, tiles * 36]
        for steps in shown["steps"].values():
            for keep, step in zip(data["keeps"], steps, strict=True):
                letters = "".join(step["kept"])
                real = letters.count("0") + letters.count("1")
                assert real == shown["full"]["tokens"]
                assert ("-" in letters) == (shown["name"] == "high"), "only this one has a letterbox"
                assert letters.count("1") == step["tokens"] == max(1, round(keep * real))
                assert [len(view) for view in step["kept"]] == [len(view) for view in step["error"]]


def test_all_tokens_give_the_answer_of_all_tokens(data):
    for shown in data["examples"]:
        for steps in shown["steps"].values():
            assert steps[-1]["answer"] == shown["full"]["answer"]
        assert shown["none"]["tokens"] == 0


def test_score_is_known_where_an_answer_is(data):
    wide, high = data["examples"]
    assert wide["full"]["score"] in (0.0, 1.0) and high["full"]["score"] is None


def test_error_is_measured_in_the_distance_to_the_mean_token(exploration):
    judge, tokens = exploration.judge, exploration.encoded.features.tokens
    kept = torch.ones(tokens.shape[:2], dtype=torch.bool)
    judge.standardise(tokens.mean((0, 1)), tokens.std((0, 1), correction=0))
    none = exploration.errors(~kept)
    # an untrained judge passes kept tokens on, and knows of the others no more than their embedding
    assert float(exploration.errors(kept).max()) < 1e-5 < float(none.min())
    centred = (tokens - tokens.mean((0, 1))).square().sum(-1).mean().sqrt()
    by_hand = (judge(tokens, ~kept) - tokens).norm(dim=-1) / centred
    torch.testing.assert_close(none, by_hand.detach())


def test_error_is_measured_where_the_judge_was_trained(parts):
    vlm, examples, scorers, judge = parts
    judge = copy.deepcopy(judge)
    judge.reconstructor.config.metric = "projector"
    exploration = Exploration(vlm, examples, scorers, judge)
    tokens = exploration.encoded.features.tokens
    kept = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    with torch.no_grad():
        project = vlm.model.model.multi_modal_projector
        real, restored = project(tokens), project(judge(tokens, kept))
    centred = (real - real.mean((0, 1))).square().sum(-1).mean().sqrt()
    torch.testing.assert_close(exploration.errors(kept), (restored - real).norm(dim=-1) / centred)
    judge.reconstructor.config.metric = "reader"
    with pytest.raises(TokenselError, match="metric 'reader'"):
        Exploration(vlm, examples, scorers, judge)


def test_page_holds_the_dictionary_and_a_still(data):
    page = embed(data)
    script = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(script[1]) == data, "a question with </script> in it must not end the script"
    assert page.count("<img") == 1 and 'alt="The image “wide” under selector at keep 0.5' in page
    assert "<script" not in page.replace(script[0], "")


def test_bad_input_is_refused(parts, exploration):
    with pytest.raises(TokenselError, match="no examples"):
        Exploration(parts[0], [], parts[2], parts[3])
    with pytest.raises(TokenselError, match="'best' is unknown here: choose one of selector, random"):
        exploration.step("best", 0.5)
    with pytest.raises(TokenselError, match="kind 'film'"):
        embed({"kind": "film"})


def test_answer_is_followed_step_by_step(parts):
    vlm = parts[0]
    schedules = {"fastv": FastV(1, 0.5), "vtw": Vtw(1), "exponential": Exponential(1, 0.7)}
    data = generation_steps(vlm, EXAMPLES, schedules, max_new_tokens=5, progress=False)
    for shown, example in zip(data["examples"], EXAMPLES, strict=True):
        for name, steps in shown["steps"].items():
            answer = vlm.generate(
                reduce_inputs(vlm.model, vlm.inputs([example.image], [vlm.prompt(example.question)])),
                5,
                schedules[name],
            )
            assert steps[-1]["text"] == answer[0] and 1 <= len(steps) <= 5
            counts = [step["tokens"] for step in steps]
            assert (
                counts == ["".join(step["kept"]).count("1") for step in steps] == sorted(counts, reverse=True)
            )
        total = "".join(shown["steps"]["vtw"][0]["kept"]).count("0")
        assert shown["steps"]["vtw"][0]["tokens"] == 0 and total == shown["tokens"]
        assert (
            shown["steps"]["exponential"][0]["tokens"]
            == shown["tokens"]
            > shown["steps"]["exponential"][-1]["tokens"]
        )
        assert 0 < shown["steps"]["fastv"][0]["tokens"] < shown["tokens"]
    page = embed(data)
    assert page.count("<img") == 1 and "tokens are left" in page
    with pytest.raises(TokenselError, match="at least one image"):
        generation_steps(vlm, [], schedules)


def uploaded(content: bytes) -> dict:
    """A file as the browser hands it over."""
    about = {"name": "own.png", "type": "", "size": len(content), "last_modified": datetime.now(UTC)}
    return about | {"content": memoryview(content)}


def test_live_explorer_answers_to_its_controls(parts):
    live = LiveExplorer(*parts, keeps=[0.25, 0.5, 1.0])
    first = bytes(live.drawing.value)
    assert (
        first.startswith(b"\x89PNG") and "all tokens" in live.words.value and "Right: x" in live.words.value
    )
    live.keep.value = 0.25
    fewer = bytes(live.drawing.value)
    assert fewer != first
    live.method.value = "random"
    assert bytes(live.drawing.value) != fewer
    live.image.value = "high"
    assert live.question.value == "who?" and "Right" not in live.words.value
    live.upload.value = (uploaded(png(3)),)
    assert live.image.value == OWN and live.question.value == "who?"
    own = bytes(live.drawing.value)
    live.upload.value = (uploaded(png(4)),)
    assert live.image.value == OWN and bytes(live.drawing.value) != own, "a second upload is drawn too"
    again = bytes(live.drawing.value)
    live.upload.value = ()
    assert bytes(live.drawing.value) == again, "what was uploaded last stays"
    live.upload.value = (uploaded(b"no image"),)
    assert "own.png: cannot be read" in live.words.value


def png(seed: int, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    noise_image(50, 40, seed).convert(mode).save(file, "PNG", **options)
    return file.getvalue()


def test_an_upload_is_read_as_every_other_image(parts):
    live = LiveExplorer(*parts, keeps=[0.5])
    exif = Image.Exif()
    exif[0x0112] = 6  # taken sideways
    live.upload.value = (uploaded(png(3, exif=exif)),)
    assert live.current[0].image.size == (50, 40), "upright"
    deep = Image.fromarray((np.arange(64 * 64).reshape(64, 64) * 16).astype(np.uint16))
    file = io.BytesIO()
    deep.save(file, "PNG")
    live.upload.value = (uploaded(file.getvalue()),)
    assert len(np.unique(np.asarray(live.current[0].image))) > 200, "16 bits are scaled, not clipped"


def test_an_error_is_shown_in_place_of_the_answers_and_does_not_stay(parts, monkeypatch):
    live = LiveExplorer(*parts, keeps=[0.25, 0.5])

    def fail(self, method, keep):
        raise RuntimeError("out of <memory>")

    with monkeypatch.context() as patch:
        patch.setattr(Exploration, "step", fail)
        live.keep.value = 0.25
        assert live.words.value == "<p>out of &lt;memory&gt;</p>" and not live.drawing.value
    live.keep.value = 0.5
    assert "all tokens" in live.words.value and bytes(live.drawing.value).startswith(b"\x89PNG")
    live.question.value = "is there an <image> tag?"
    assert "computing" not in live.words.value


def test_onevision_is_asked_in_ordinary_words():
    """Its tokenizer knows few words, and those that it does not know once counted as videos."""
    vlm = load_vlm("data/mini/llava-onevision", device="cpu")
    width = vlm.model.config.vision_config.hidden_size
    judge = MaskedAutoencoder.new(width, layers=1, heads=4).eval()
    examples = [Example("page", noise_image(64, 64, 1), "What is this?")]
    live = LiveExplorer(vlm, examples, {"norm": make_scorer("norm")}, judge, keeps=[0.5])
    for question in ("What is this?", "Wie heißt das Ä?", ""):
        live.question.value = question
        assert "all tokens" in live.words.value and bytes(live.drawing.value).startswith(b"\x89PNG")
        live.upload.value = (uploaded(png(3)),)
    (steps,) = generation_steps(vlm, examples, {"fastv": FastV(1, 0.5)}, 4, progress=False)["examples"]
    assert 0 < steps["steps"]["fastv"][0]["tokens"] < steps["tokens"]
