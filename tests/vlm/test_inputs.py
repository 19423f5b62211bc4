"""Questions and images of every kind: they are answered, or refused in one line."""

import io
import string

import jaxtyping
import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as DatasetImage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import ask, logits, noise_image, onevision_processor, tiny_onevision, tiny_vlm

from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, downsample, encode, load_vlm, reduce, reduce_inputs
from tokensel.vlm.native import switch_off


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


@pytest.fixture(scope="module")
def onevision() -> Vlm:
    """Its tokenizer has no <video>, as that of the small model that ships with the book."""
    model, processor = tiny_onevision(), onevision_processor()
    assert "<video>" not in processor.tokenizer.get_vocab()
    return Vlm(model, processor, "tiny", switch_off(model, processor))


# Questions

CHARACTERS = [*string.printable[:95], *"äöüßéèêçñøåœÆÉ€–“日Ω😀", "<unk>"]


@given(pieces=st.lists(st.sampled_from(CHARACTERS), max_size=8), with_image=st.booleans())
@settings(deadline=None, max_examples=25)
def test_every_character_may_be_asked_about(vlm, onevision, pieces, with_image):
    for each in (vlm, onevision):
        prompt = each.prompt("".join(pieces), with_image)
        inputs = each.inputs([noise_image(24, 24) if with_image else None], [prompt])
        reduced = reduce_inputs(each.model, inputs, make_scorer("norm"), 0.5)
        assert reduced.n_visual.tolist() == [round(0.5 * n) for n in reduced.n_visual_full.tolist()]
        assert bool(reduced.n_visual.any()) == with_image
        assert len(each.processor.tokenizer(prompt).input_ids) >= len(pieces)


@pytest.mark.parametrize("model", ["llava-next", "llava-onevision"])
def test_the_small_models_take_any_question(model):
    small = load_vlm(f"data/mini/{model}", device="cpu")
    for question in ("What is this?", "Wie heißt das Ä?", ""):
        assert isinstance(small.answer(noise_image(64, 64), question, max_new_tokens=2), str)
        assert isinstance(small.answer(None, question, max_new_tokens=2), str)


@pytest.mark.parametrize("question", ["Is there an <image> tag?", "<image>", "a<image>"])
def test_a_question_with_the_placeholder_is_named(vlm, question):
    for image in (noise_image(24, 24), None):
        with pytest.raises(TokenselError, match="contains <image>, which stands for an image") as caught:
            vlm.answer(image, question)
        assert question in str(caught.value) and "\n" not in str(caught.value)


def test_a_place_for_a_video_is_named(onevision):
    with pytest.raises(TokenselError, match="contains <video>, which stands for a video"):
        onevision.answer(None, "a <video>?")
    with pytest.raises(TokenselError, match="prompt 0 has a place for a video"):
        onevision.inputs(None, ["<video>?"])


@given(
    counts=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 2), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=30)
def test_images_and_placeholders_are_counted_row_by_row(vlm, counts, places):
    images = [[noise_image(24, 24)] * count for count in counts]
    texts = ["<image>" * place + "?" for place in places[: len(counts)]]
    if counts == places[: len(counts)]:
        assert len(vlm.inputs(images, texts)["input_ids"]) == len(counts)
    else:
        with pytest.raises(TokenselError, match=r"image placeholders \(<image>\) and . images"):
            vlm.inputs(images, texts)


# Images


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_image_may_come_in_any_form(vlm, tmp_path):
    image = noise_image(40, 48)
    image.save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    forms = [image, path, str(path), png(image), io.BytesIO(png(image)), np.asarray(image)]
    forms += [{"bytes": png(image), "path": None}, [path], (image,)]
    answers = {vlm.answer(form, "what?", max_new_tokens=4) for form in forms}
    assert len(answers) == 1
    several = vlm.inputs([[path, image], np.asarray(image)], [vlm.prompt("?", 2), vlm.prompt("?")])
    assert len(several["image_sizes"]) == 3


def test_images_may_be_a_column_of_a_dataset(vlm):
    images = [noise_image(24, 24, seed) for seed in range(2)]
    prompts = [vlm.prompt("what?")] * 2
    column = Dataset.from_dict({"image": images}).cast_column("image", DatasetImage())["image"]
    expected = vlm.inputs(images, prompts)
    assert all(torch.equal(vlm.inputs(column, prompts)[name], value) for name, value in expected.items())
    with pytest.raises((TokenselError, jaxtyping.TypeCheckError), match="images"):
        vlm.inputs("ab", prompts)


def test_an_image_that_cannot_be_read_is_refused_in_one_line(vlm, tmp_path):
    (tmp_path / "cut.png").write_bytes(png(noise_image(24, 24))[:60])
    bad = [tmp_path / "none.png", tmp_path / "cut.png", b"", b"text", 7, torch.zeros(3, 4, 4)]
    bad += [np.zeros((0, 4, 3)), Image.new("RGB", (0, 5)), "https://example.org/a.png", [None]]
    for image in bad:
        with pytest.raises(TokenselError) as caught:
            vlm.answer(image, "what?")
        assert "\n" not in str(caught.value)


def test_a_transparent_or_rotated_image_is_read_alike_on_every_way_in(vlm, tmp_path):
    sideways = noise_image(40, 90)
    exif = sideways.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    sideways.save(tmp_path / "a.jpg", exif=exif, quality=100)
    clear = noise_image(30, 30).convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "b.png")
    for name, size in (("a.jpg", [90, 40]), ("b.png", [30, 30])):
        by_path = vlm.inputs([tmp_path / name], [vlm.prompt("?")])
        by_image = vlm.inputs([Image.open(tmp_path / name)], [vlm.prompt("?")])
        assert torch.equal(by_path["pixel_values"], by_image["pixel_values"])
        assert by_path["image_sizes"].tolist() == [size]
    assert by_path["pixel_values"].unique().numel() == 3  # white, once a channel


@given(side=st.integers(1, 3), ratio=st.integers(1, 90), tall=st.booleans())
@settings(deadline=None, max_examples=15)
def test_the_thumbnail_serves_where_unpadding_leaves_nothing_else(vlm, onevision, side, ratio, tall):
    size = (side * ratio, side) if tall else (side, side * ratio)
    for each in (vlm, onevision):  # one of them cuts off a row sooner
        encoded = encode(each.model, each.inputs([noise_image(*size)], [each.prompt("?")]))
        layout = encoded.layout
        for scorer, keep in ((make_scorer("norm"), 0.5), (make_scorer("random"), 0.01)):
            reduced = reduce(encoded, scorer, keep, thumbnail="drop")
            assert int(reduced.n_visual) >= 1
            others = bool((layout.cell & ~layout.thumbnail).any())
            assert not (others and len(layout.tiles) and reduced.kept[0].any() and layout.tiles[0] > 1)


# What the processor returns


def test_processor_outputs_of_every_kind_are_read_or_refused(vlm):
    image, prompt = noise_image(40, 48), vlm.prompt("what?")
    wanted = reduce_inputs(vlm.model, vlm.inputs([image], [prompt]), make_scorer("norm"), 0.3)
    for kind in ("pt", "np", None):
        inputs = vlm.processor(images=[[image]], text=[prompt], return_tensors=kind)
        for given_inputs in (inputs, dict(inputs)):
            reduced = reduce_inputs(vlm.model, given_inputs, make_scorer("norm"), 0.3)
            torch.testing.assert_close(reduced["inputs_embeds"], wanted["inputs_embeds"])
    inputs = vlm.processor(images=[[image]], text=[prompt], return_tensors="pt")
    bad = [
        ({"image_sizes": None}, "pixel_values without image_sizes"),
        ({"input_ids": None}, "input_ids with at least one row are missing"),
        ({"input_ids": torch.zeros(0, 3).long()}, "at least one row"),
        ({"input_ids": [[1, 2], [1]]}, "input_ids is no tensor: .*return_tensors='pt'"),
        ({"pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)}, "videos cannot be reduced"),
    ]
    for change, message in bad:
        with pytest.raises(TokenselError, match=message):
            reduce_inputs(vlm.model, {**inputs, **change})
    with pytest.raises(TokenselError, match="no prompts: give at least one"):
        vlm.inputs([], [])


def test_a_video_is_refused_and_not_left_out(onevision):
    """The stock model reads it, so keeping everything without it would answer another question."""
    inputs = dict(ask(onevision, [0]))
    inputs["pixel_values_videos"] = torch.zeros(1, 4, 3, 24, 24)
    with pytest.raises(TokenselError, match="give their frames as images"):
        reduce_inputs(onevision.model, inputs)


def test_a_llava_next_that_keeps_the_cls_token_is_refused():
    vlm = tiny_vlm()
    inputs = ask(vlm, [0])
    vlm.model.config.vision_feature_select_strategy = "full"
    with pytest.raises(TokenselError, match=r"strategy 'full' keeps the CLS token.*give 'default'"):
        reduce_inputs(vlm.model, inputs)


def test_values_of_the_wrong_type_are_refused_in_one_line(vlm, monkeypatch):
    encoded, norm = encode(vlm.model, ask(vlm, [0])), make_scorer("norm")
    calls = [
        lambda: reduce(encoded, norm, "0.3"),
        lambda: reduce(encoded, norm, [0.3]),
        lambda: reduce(encoded, norm, True),
        lambda: reduce(encoded, "norm", 0.3),
        lambda: reduce(encoded, 7, 0.3),
        lambda: reduce(encoded, norm, 0.3, thumbnail=None),
        lambda: reduce(encoded, norm, 0.3, budget=["image"]),
        lambda: downsample(encoded, "0.3"),
        lambda: make_scorer(7),
        lambda: make_scorer("random", seed="x"),
        lambda: make_scorer("random", seed=0.5),
        lambda: make_scorer("selector", selector=7),
    ]
    # a user's calls are not type-checked before the library sees them, as these would be here
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for call in calls:
        with pytest.raises(TokenselError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_logits_depend_on_the_question(vlm):
    # without this, questions might be lost on the way
    one, other = (vlm.inputs([noise_image(24, 24)], [vlm.prompt(q)]) for q in ("a", "b"))
    assert not torch.equal(logits(vlm.model, one)[:, -1], logits(vlm.model, other)[:, -1])
