"""Vision encoders: the very features a LLaVA model uses; features on disk."""

import shutil

import pytest
import torch
from little import VISION, clip_tower, cut, sample_images, save_images
from safetensors.torch import load_file, save_file
from tiny import TILE, tiny_llava
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tokensel.data.encoders import VisionEncoder
from tokensel.data.feature_cache import FeatureCache, build_cache
from tokensel.data.image_sources import open_images
from tokensel.utils.errors import TokenselError


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


@pytest.fixture(scope="module")
def folder(llava, tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    for part in llava:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return VisionEncoder.from_pretrained(folder)


def test_features_are_those_the_language_model_sees(llava, encoder):
    model, processor = llava
    inputs = processor(
        images=sample_images(2), text=["<image>", "<image>"], return_tensors="pt", padding=True
    )
    seen = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    hook.remove()
    pixels = encoder.preprocess(sample_images(2), tiles="anyres")
    assert len(pixels) == len(seen[0]) > 4
    assert torch.equal(encoder.features(pixels).tokens, seen[0])
    assert (encoder.width, encoder.tokens, encoder.grid, encoder.size) == (32, 36, (6, 6), TILE)


def test_a_whole_image_is_squashed_as_the_thumbnail_is(llava, encoder):
    stock = torch.cat(
        [
            llava[1].image_processor(images=[p], return_tensors="pt")["pixel_values"][0, :1]
            for p in sample_images()
        ]
    )
    assert torch.equal(encoder.preprocess(sample_images()), stock)


def test_cls_attention_is_that_of_the_layer_below_the_features(encoder):
    pixels = encoder.preprocess(sample_images(2))
    features = encoder.features(pixels, cls_attention=True)
    encoder.tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = encoder.tower(pixels, output_attentions=True).attentions[encoder.feature_layer]
    encoder.tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(features.cls_attention, weights.mean(1)[:, 0, 1:])
    assert encoder.features(pixels).cls_attention is None


def test_a_model_in_memory_shares_its_tower(llava, encoder):
    shared = VisionEncoder.from_vlm(*llava)
    assert shared.tower is llava[0].model.vision_tower
    assert shared.fingerprint() == encoder.fingerprint()
    assert torch.equal(shared.encode(sample_images()).tokens, encoder.encode(sample_images()).tokens)


def test_the_tower_is_read_from_the_shards_that_hold_it(llava, encoder, tmp_path):
    model, processor = llava
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    processor.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    language = [path for path in shards if not any("vision_tower" in key for key in load_file(path))]
    assert len(shards) > 3 and language
    for path in language:
        path.unlink()
    assert VisionEncoder.from_pretrained(tmp_path).fingerprint() == encoder.fingerprint()


def test_encoding_does_not_depend_on_the_batch(encoder):
    one, many = (
        encoder.encode(sample_images(), batch_size=1),
        encoder.encode(sample_images(), tiles="whole", batch_size=8),
    )
    torch.testing.assert_close(one.tokens, many.tokens, atol=1e-5, rtol=1e-5)
    assert many.keys.tolist() == [0, 1, 2] and not many.tokens.requires_grad


def test_towers_alone_and_inside_clip_and_siglip(tmp_path):
    tower = clip_tower(tmp_path / "tower")
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    clip = CLIPModel(
        CLIPConfig(vision_config=CLIPVisionConfig(**VISION).to_dict(), text_config=text.to_dict())
    )
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 24}).save_pretrained(tmp_path / "clip")
    alone, inside = (
        VisionEncoder.from_pretrained(tmp_path / "tower"),
        VisionEncoder.from_pretrained(tmp_path / "clip"),
    )
    assert alone.feature_layer == -2 and alone.drop_cls and alone.fingerprint() == inside.fingerprint()
    pixels = alone.preprocess(sample_images())
    with torch.no_grad():
        expected = tower.eval()(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(alone.features(pixels).tokens, expected)
    last = VisionEncoder.from_pretrained(tmp_path / "tower", feature_layer=-1)
    assert last.fingerprint() != alone.fingerprint()
    with pytest.raises(TokenselError, match="cuts no anyres tiles"):
        alone.preprocess(sample_images(), tiles="anyres")

    torch.manual_seed(0)
    siglip = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False))
    siglip.save_pretrained(tmp_path / "siglip")
    encoder = VisionEncoder.from_pretrained(tmp_path / "siglip")
    assert (encoder.feature_layer, encoder.drop_cls, encoder.tokens) == (-1, False, 16)
    assert encoder.features(encoder.preprocess(sample_images())).tokens.shape == (3, 16, 16)
    with pytest.raises(TokenselError, match="no CLS token"):
        encoder.features(encoder.preprocess(sample_images()), cls_attention=True)


def test_what_is_no_encoder_says_so_in_one_line(folder, tmp_path):
    def refused(name, words):
        with pytest.raises(TokenselError, match=words) as caught:
            VisionEncoder.from_pretrained(name)
        assert "\n" not in str(caught.value)

    refused("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14-336: .*give a local folder")
    refused(tmp_path, "give a local folder")
    clip_tower(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(tmp_path / "cut", "cut short")
    shutil.copytree(folder, tmp_path / "hollow")
    tensors = load_file(folder / "model.safetensors")
    some = next(key for key in tensors if "vision_tower" in key)
    save_file({k: v for k, v in tensors.items() if k != some}, tmp_path / "hollow" / "model.safetensors")
    refused(tmp_path / "hollow", "its vision tower lacks")


# --- features on disk -------------------------------------------------------------------------------------


def test_the_cache_holds_every_tile_and_goes_on_where_it_was_stopped(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("tokensel.data.feature_cache.IMAGES_A_SHARD", 2)
    save_images(tmp_path / "p", 5)
    cut(tmp_path / "p" / "4.jpg")
    source = open_images(tmp_path / "p")
    calls = []
    features = encoder.features
    monkeypatch.setattr(encoder, "features", lambda pixels: calls.append(len(pixels)) or features(pixels))
    monkeypatch.setattr(
        "tokensel.data.feature_cache.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "c", source, encoder, "anyres", progress=False)
    monkeypatch.undo()
    monkeypatch.setattr("tokensel.data.feature_cache.IMAGES_A_SHARD", 2)
    (tmp_path / "c" / "features-00001.safetensors").unlink()
    cache = build_cache(tmp_path / "c", source, encoder, "anyres", progress=False)
    good = [image for row in source.stream() if (image := source.open(*row))]
    expected = encoder.features(encoder.preprocess(good, "anyres")).tokens
    assert len(cache) == len(expected) == sum(calls) and len(good) == 4
    torch.testing.assert_close(cache[torch.arange(len(cache))].tokens, expected, atol=1e-5, rtol=1e-5)
    rows = torch.tensor([3, 0, len(cache) - 1])
    assert torch.equal(cache[rows].tokens, FeatureCache(tmp_path / "c")[rows].tokens)
    assert cache.skipped == [str(tmp_path / "p" / "4.jpg")]
    assert len(cache[torch.arange(len(cache))].keys.unique()) == len(cache)


def test_a_cache_of_another_encoder_or_cut_short_is_refused(encoder, tmp_path):
    save_images(tmp_path / "p")
    clip_tower(tmp_path / "tower")
    source = open_images(tmp_path / "p")
    build_cache(tmp_path / "c", source, encoder, progress=False)
    with pytest.raises(TokenselError, match="give another cache folder or delete it"):
        build_cache(tmp_path / "c", source, VisionEncoder.from_pretrained(tmp_path / "tower"), progress=False)
    with pytest.raises(TokenselError, match="give another cache folder or delete it"):
        build_cache(tmp_path / "c", source, encoder, "anyres", progress=False)
    with pytest.raises(TokenselError, match="no feature cache"):
        FeatureCache(tmp_path)
    shard = tmp_path / "c" / "features-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(TokenselError, match="cut short"):
        FeatureCache(tmp_path / "c")
