"""Loading a LLaVA from a folder, asking it, and what is said when that fails."""

import pytest
from tiny import noise_image, tiny_llava, tiny_selector, tiny_vlm
from transformers import Blip2Config, Qwen3_5Config

from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, load_vlm, reduce_inputs


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_three_lines_put_a_selector_in_front_of_a_llava(folder, tmp_path):
    tiny_selector().save_pretrained(tmp_path)
    vlm = load_vlm(folder)
    selector = make_scorer("selector", selector=tmp_path)
    image = noise_image(40, 48)
    answer = vlm.answer(image, "what is this?", scorer=selector, keep=0.3, max_new_tokens=5)
    inputs = vlm.inputs([image], [vlm.prompt("what is this?")])
    assert answer == vlm.generate(reduce_inputs(vlm.model, inputs, selector, 0.3), 5)[0]
    # nothing kept back: the stock model's own answer
    stock = vlm.model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (
        vlm.answer(image, "what is this?", max_new_tokens=5)
        == vlm.processor.batch_decode(stock, skip_special_tokens=True)[0].strip()
    )
    assert isinstance(vlm.answer(None, "and without?", max_new_tokens=5), str)


def test_missing_and_damaged_models(folder, tmp_path):
    with pytest.raises(TokenselError, match=r"'nobody/no-such-llava'.*give a local folder") as caught:
        load_vlm("nobody/no-such-llava")
    assert "\n" not in str(caught.value)
    with pytest.raises(TokenselError, match="holds no vision-language model with its processor"):
        load_vlm(tmp_path)
    vlm = load_vlm(folder)
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(TokenselError, match="cut short or damaged"):
        load_vlm(tmp_path)


def test_a_model_of_another_family_is_refused(vlm, tmp_path):
    vlm.processor.save_pretrained(tmp_path)
    Blip2Config().save_pretrained(tmp_path)
    with pytest.raises(TokenselError, match="is a blip-2, which is none of the families known here"):
        load_vlm(tmp_path)


def test_a_model_in_which_dropping_is_not_hiding_is_refused_with_the_reason(vlm, tmp_path):
    vlm.processor.save_pretrained(tmp_path)
    Qwen3_5Config().save_pretrained(tmp_path)
    with pytest.raises(TokenselError, match=r"is a qwen3_5: .* linear attention.* a Qwen3-VL") as caught:
        load_vlm(tmp_path)
    assert "\n" not in str(caught.value)
