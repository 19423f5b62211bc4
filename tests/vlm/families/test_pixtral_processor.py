"""The processor of Mistral 3 and Pixtral without torchvision: its placeholders, and what it saves."""

import pytest
import tiny_families
import torch
from tiny import noise_image
from transformers import AutoConfig

from tokensel.book.tiny.mistral3 import PIXTRAL
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm
from tokensel.vlm.families import family_key, family_of
from tokensel.vlm.families.mistral3 import PixtralProcessor


def test_rows_of_an_image_end_in_breaks_and_the_image_in_an_end(tmp_path):
    vlm = tiny_families.loaded("mistral3", tmp_path)
    image, line, end = (vlm.processor.tokenizer.convert_tokens_to_ids(token) for token in PIXTRAL)
    inputs = vlm.inputs(
        [[noise_image(40, 48), noise_image(10, 20)], []], [vlm.prompt("a", 2), vlm.prompt("b", 0)]
    )
    marks = [token for token in inputs["input_ids"][0].tolist() if token in (image, line, end)]
    # tokens are 8 pixels wide, and what is left over at an edge makes one more
    first, second = ([image] * 6 + [line]) * 5, ([image] * 3 + [line]) * 2
    assert marks == [*first[:-1], end, *second[:-1], end]
    assert not set(inputs["input_ids"][1].tolist()) & {image, line, end}
    assert inputs["image_sizes"].tolist() == [[40, 48], [16, 24]]
    assert inputs["pixel_values"].shape == (2, 3, 40, 48) and not inputs["pixel_values"][1, :, 16:].any()


def test_what_is_saved_is_read_again(tmp_path):
    vlm = tiny_families.loaded("mistral3", tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "again")
    again = PixtralProcessor.from_pretrained(tmp_path / "again")
    assert (again.patch_size, again.spatial_merge_size) == (4, 2)
    prompt, images = [vlm.prompt("what?")], [[noise_image(24, 56)]]
    one, two = (made(images=images, text=prompt, return_tensors="pt") for made in (vlm.processor, again))
    assert one.keys() == two.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one
    )


def test_a_pixtral_is_told_from_a_llava_by_its_tower(tmp_path):
    for family, name in (("pixtral", "Pixtral"), ("llava", "LLaVA-1.5")):
        tiny_families.save(family, tmp_path / family)
        config = AutoConfig.from_pretrained(tmp_path / family)
        assert config.model_type == "llava"
        assert family_key(config) == family and family_of(config).name == name


def test_a_pixtral_that_leaves_out_a_cls_token_is_refused(tmp_path):
    vlm = tiny_families.loaded("pixtral", tmp_path)
    vlm.model.config.vision_feature_select_strategy = "default"
    vlm.model.save_pretrained(tmp_path)
    with pytest.raises(TokenselError, match="loses its first patch") as caught:
        load_vlm(tmp_path)
    assert "\n" not in str(caught.value)
