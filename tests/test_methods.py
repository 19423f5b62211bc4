"""All methods through one call."""

import pytest
import torch
from tiny import noise_image, tiny_learned, tiny_selector, tiny_vlm

from tokensel.methods import Batch, check_method, methods, prepare
from tokensel.schedules import SCHEDULES
from tokensel.scorers import LEARNED, make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Choices, Vlm

IMAGES = [noise_image(40, 48), noise_image(30, 90, seed=1)]
QUESTIONS = ["what?", "and what is this?"]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


@pytest.fixture(scope="module")
def selector():
    return make_scorer("selector", selector=tiny_selector())


def ask(vlm, method, keep=0.3, batch=None, **options):
    return prepare(batch or Batch(vlm, IMAGES, QUESTIONS, [1, 2]), method, keep, **options)


@pytest.mark.parametrize(
    "method", [name for name in methods() if name != "native"]
)  # which needs a LLaVA-OneVision
def test_every_method_gives_generate_what_it_needs(vlm, method):
    scorer = make_scorer(method, **tiny_learned()) if method in LEARNED else None
    reduced = ask(vlm, method, scorer=scorer)
    answers = vlm.generate(reduced, max_new_tokens=4)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert reduced.n_visual_full.tolist() == [156, 144]
    wanted = {"full": [156, 144], "none": [0, 0], "downsample": None, "pool": None}.get(method, [47, 43])
    if wanted is None:  # whole grids only: 3 x 4 of 36 cells, then unpadding
        assert ((reduced.n_visual / reduced.n_visual_full - 12 / 36).abs() < 0.08).all()
    else:
        assert reduced.n_visual.tolist() == wanted
    text = reduced["attention_mask"].sum(1) - reduced.n_visual - reduced.n_newline
    assert text.tolist() == [
        (len(vlm.prompt(q)) - len("<image>")) if method != "none" else len(vlm.prompt(q, False))
        for q in QUESTIONS
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_alone_gets_the_whole_image_and_after_a_scorer_what_it_chose(vlm, schedule):
    row = check_method(schedule)
    assert row.schedule == schedule and row.uses_keep == SCHEDULES[schedule].uses_keep and not row.chooses
    assert torch.equal(ask(vlm, schedule)["inputs_embeds"], ask(vlm, "full")["inputs_embeds"])
    both = check_method(f"random+{schedule}")
    assert (both.schedule, both.scorer, both.uses_seed, both.uses_keep, both.chooses) == (
        schedule,
        "random",
        True,
        True,
        True,
    )
    assert torch.equal(ask(vlm, f"random+{schedule}")["inputs_embeds"], ask(vlm, "random")["inputs_embeds"])


def test_full_is_the_stock_model(vlm):
    inputs = vlm.inputs(IMAGES, [vlm.prompt(q) for q in QUESTIONS])
    with torch.no_grad():
        assert torch.equal(vlm.model(**ask(vlm, "full")).logits, vlm.model(**inputs).logits)
        blind = vlm.inputs(None, [vlm.prompt(q, False) for q in QUESTIONS])
        assert torch.equal(vlm.model(**ask(vlm, "none")).logits, vlm.model(**blind).logits)


def test_a_batch_is_encoded_once(vlm):
    runs = []
    handle = vlm.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    batch = Batch(vlm, IMAGES, QUESTIONS, [1, 2])
    for method in ("full", "random", "norm", "cls", "diversity", "uniform", "none"):
        for keep in (0.2, 0.6):
            shared = ask(vlm, method, keep, batch=batch)
    assert len(runs) == 1
    handle.remove()
    assert torch.equal(shared["inputs_embeds"], ask(vlm, "none", 0.6)["inputs_embeds"])
    again = ask(vlm, "random", 0.2)
    assert torch.equal(again["inputs_embeds"], ask(vlm, "random", 0.2, batch=batch)["inputs_embeds"])


def test_random_depends_on_the_key_and_not_on_the_batch(vlm):
    both = ask(vlm, "random")
    one = prepare(Batch(vlm, IMAGES[1:], QUESTIONS[1:], [2]), "random", 0.3)
    tiles = len(one.kept)
    assert torch.equal(both.kept[-tiles:], one.kept)
    other = prepare(Batch(vlm, IMAGES[1:], QUESTIONS[1:], [3]), "random", 0.3)
    assert not torch.equal(other.kept, one.kept)
    assert not torch.equal(ask(vlm, "random", scorer=make_scorer("random", seed=1)).kept, both.kept)


def test_choices_reach_the_reduction(vlm):
    dropped = ask(vlm, "norm", choices={"newline": "drop", "positions": "original"})
    assert dropped.n_newline.tolist() == [0, 0] and "position_ids" in dropped
    same = ask(vlm, "norm", choices=Choices(newline="drop", positions="original"))
    assert torch.equal(dropped["inputs_embeds"], same["inputs_embeds"])
    assert not bool(ask(vlm, "norm", choices={"thumbnail": "drop"}).kept[0].any())


def test_keep_none_lets_the_selector_decide(vlm, selector):
    reduced = ask(vlm, "selector", None, scorer=selector)
    encoded = Batch(vlm, IMAGES, QUESTIONS).seeing
    wanted = (selector(encoded.features) > 0) & encoded.layout.valid
    assert torch.equal(reduced.kept, wanted)


def test_bad_input(vlm, selector):
    for name in ("fast", "none+fastv", "full+fastv", "fastv+selector", "selector+norm", "+fastv"):
        with pytest.raises(
            TokenselError, match="is unknown: choose one of full, none, selector, random"
        ) as caught:
            ask(vlm, name)
        assert name in str(caught.value)
    for method in methods():
        for keep in (0.0, 1.5, float("nan")):
            with pytest.raises(TokenselError, match="keep is"):
                ask(vlm, method, keep, scorer=selector if method in LEARNED else None)
    with pytest.raises(TokenselError, match="needs one: pass selector="):
        ask(vlm, "selector")
    with pytest.raises(TokenselError, match="not an option"):
        ask(vlm, "norm", choices={"colour": "red"})
    with pytest.raises(TokenselError, match="1 rows of images for 2 questions"):
        prepare(Batch(vlm, IMAGES[:1], QUESTIONS), "norm", 0.3)
