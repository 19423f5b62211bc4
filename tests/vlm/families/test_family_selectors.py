"""Selectors for the towers of all families: trained on the patches of a token, saved, and chosen with."""

import pytest
import tiny_families
import torch
from tiny import noise_image
from transformers import AutoConfig
from typer.testing import CliRunner

from tokensel import cli
from tokensel.data.encoders import VisionEncoder
from tokensel.model.positions import position_codes, sincos
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.training.config import TrainConfig
from tokensel.training.train import train
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, encode, load_encoder, load_vlm, reduce
from tokensel.vlm.family_encoder import FamilyEncoder

SIZES = [(40, 48), (24, 56), (32, 32), (64, 20)]
IMAGES = [noise_image(*size, seed=seed) for seed, size in enumerate(SIZES)]
OPTIONS = dict(steps=3, batch_size=4, layers=1, heads=4, progress=False, device="cpu", workers=1)


@pytest.fixture(scope="module", params=tiny_families.MAKERS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("of") / request.param
    tiny_families.save(request.param, path)
    return path


def asked(vlm: Vlm, images) -> object:
    return encode(vlm.model, vlm.inputs(images, [vlm.prompt("what?")] * len(images)))


def test_an_encoder_gives_the_features_that_the_model_selects_among(folder):
    encoder, vlm = load_encoder(folder), load_vlm(folder, device="cpu")
    encoded = asked(vlm, [[image] for image in IMAGES])
    inside = encoded.features
    if not isinstance(encoder, FamilyEncoder):  # a CLIP tower, whose image processor cuts out the middle
        assert type(encoder) is VisionEncoder
        return
    features = encoder.encode(IMAGES, tiles="anyres", batch_size=2)
    tokens = inside.by_token()
    assert torch.equal(features.grid, inside.grid) and torch.equal(features.valid, inside.valid)
    assert (features.tokens - tokens).abs().max() < 1e-5
    assert features.tokens.shape[-1] == encoder.width
    assert len(encoded.layout.source) == int(features.valid.sum())


@torch.no_grad()
def test_the_patches_of_a_token_are_those_that_the_model_merges(folder):
    vlm = load_vlm(folder, device="cpu")
    encoded = asked(vlm, [[image] for image in IMAGES])
    out = encoded.tower_output
    tokens = out.tokens.flatten(0, 1)[encoded.layout.source]  # [packed, channels of the patches]
    if vlm.model.config.model_type == "qwen3_vl":
        with pytest.raises(TokenselError, match="choose another"):
            encoded.family.embed(encoded, tokens)
        return
    merged = encoded.family.embed(encoded, tokens)
    assert (merged - out.embeds).abs().max() < 1e-5


def test_a_selector_is_trained_saved_loaded_and_chosen_with(folder, tmp_path):
    config = TrainConfig(encoder=str(folder), out=str(tmp_path / "out"), **OPTIONS)
    trained = train(config, images=IMAGES)
    assert len(trained.history) == 3
    selector = TokenSelector.from_pretrained(tmp_path / "out" / "selector")
    kind = AutoConfig.from_pretrained(folder).vision_config.model_type
    assert selector.config.tower == kind and selector.config.encoder == str(folder)
    vlm = load_vlm(folder, device="cpu")
    scorer = make_scorer("selector", selector=str(tmp_path / "out" / "selector"))
    together = asked(vlm, [[image] for image in IMAGES])
    reduced = reduce(together, scorer, 0.5)
    assert bool((reduced.n_visual < reduced.n_visual_full).all())
    whole = together.score(scorer)
    for number, image in enumerate(IMAGES):  # padding beside larger images changes nothing
        alone = asked(vlm, [[image]]).score(scorer)
        assert (whole[together.layout.image == number] - alone).abs().max() < 1e-4
    assert reduce(together, scorer, None).n_visual.shape == (len(IMAGES),)  # as many as it would keep


def test_a_training_that_was_interrupted_ends_at_the_same_weights(folder, tmp_path):
    once = train(TrainConfig(encoder=str(folder), **OPTIONS | {"steps": 4}), images=IMAGES)
    again = TrainConfig(encoder=str(folder), out=str(tmp_path), save_every=2, **OPTIONS | {"steps": 4})
    train(again, images=IMAGES)
    for one, two in zip(once.selector.parameters(), train(again, images=IMAGES).selector.parameters()):
        assert torch.equal(one, two)


def test_an_unreadable_image_is_a_row_without_tokens(folder, tmp_path):
    for number, image in enumerate(IMAGES[:2]):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    trained = train(TrainConfig(encoder=str(folder), images=str(tmp_path), **OPTIONS))
    assert [name.split("/")[-1] for name in trained.skipped] == ["broken.png"]


def test_a_selector_of_another_tower_gets_one_line(folder):
    vlm = load_vlm(folder, device="cpu")
    for tower, layer in (("another_tower", None), ("", -2)):
        config = SelectorConfig(width=32, layers=1, heads=4, tower=tower, feature_layer=layer)
        scorer = make_scorer("selector", selector=TokenSelector(config))
        if not tower and vlm.model.config.model_type == "llava":
            continue  # layer -2 of a CLIP tower is what this one reads
        with pytest.raises(TokenselError, match="give the selector that belongs to") as caught:
            reduce(asked(vlm, [[IMAGES[0]]]), scorer, 0.5)
        assert "\n" not in str(caught.value)


def test_what_a_ragged_encoder_cannot_do_gets_one_line(folder, tmp_path):
    encoder = load_encoder(folder)
    if not encoder.ragged:
        train(TrainConfig(encoder=str(folder), cache=str(tmp_path), **OPTIONS), images=IMAGES)
        return
    with pytest.raises(TokenselError, match="leave cache out"):
        train(TrainConfig(encoder=str(folder), cache=str(tmp_path), **OPTIONS), images=IMAGES)


@pytest.mark.parametrize(("family", "width"), [("qwen2_5_vl", 1280), ("internvl", 1024)])
def test_a_selector_is_trained_on_64_images_at_the_true_width_of_a_tower(family, width, tmp_path):
    """Two layers of the tower, and small images; by the command, from files, each image once."""
    tiny_families.save(family, tmp_path / "model", wide=True)
    (tmp_path / "images").mkdir()
    for seed in range(64):
        size = (56, 84) if seed % 2 else (84, 56)
        noise_image(*size, seed=seed).save(tmp_path / "images" / f"{seed}.png")
    words = ["train", "--images", tmp_path / "images", "--encoder", tmp_path / "model", "--out", tmp_path]
    words += ["--steps", 4, "--batch-size", 16, "--statistics-tiles", 16, "--layers", 1, "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*map(str, words), "--no-progress"])
    assert done.exit_code == 0, done.output
    scorer = make_scorer("selector", selector=str(tmp_path / "selector"))
    assert scorer.model.config.width == width
    vlm = load_vlm(tmp_path / "model", device="cpu")
    reduced = reduce(asked(vlm, [[noise_image(112, 140)], [noise_image(168, 84)]]), scorer, 0.3)
    assert torch.equal(reduced.n_visual, (0.3 * reduced.n_visual_full + 0.5).long())
    assert len(vlm.generate(reduced, 2)) == 2
    other = {"qwen2_5_vl": "internvl", "internvl": "qwen2_5_vl"}[family]
    wrong = tiny_families.loaded(other, tmp_path / "other")
    with pytest.raises(TokenselError, match=r"was trained for features of tower .* give the") as caught:
        reduce(asked(wrong, [[IMAGES[0]]]), scorer, 0.3)
    assert "\n" not in str(caught.value)


def test_codes_of_a_grid_tell_rows_and_columns():
    grid = torch.tensor([[2, 8], [4, 4]])
    codes = position_codes(16, 12, grid=grid)
    assert torch.equal(codes[1], sincos(16, 12)) and not torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0, :8, :6], codes[0, :1, :6].expand(8, 6))  # one row, one code of rows
    assert torch.equal(codes[0, :8, 6:], codes[0, 8:, 6:])
