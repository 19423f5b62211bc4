"""The formulas agree with torch's own FLOP counter, and with the bytes of a real cache."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from tokensel.cost import count_decoder, count_projector, count_trunk, count_vision, first_token, kv_bytes
from tokensel.errors import TokenselError
from tokensel.selector import SelectorConfig, TokenSelector

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}


def counted(run) -> int:
    # the counter does not know the CPU's fused attention; written out, it is made of products that it knows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "model"), [(CLIPVisionConfig, CLIPVisionModel), (SiglipVisionConfig, SiglipVisionModel)]
)
def test_vision_towers(kind, model):
    config = kind(**SMALL, image_size=56, patch_size=14)
    if kind is SiglipVisionConfig:
        config.vision_use_head = False  # as LLaVA-OneVision has it
    pixels = torch.zeros(3, 3, 56, 56)
    assert count_vision(config, 3) == pytest.approx(counted(lambda: model(config).eval()(pixels)), rel=0.02)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
def test_language_models_in_prefill_and_decoding(kind):
    config = kind(**SMALL, num_key_value_heads=2, vocab_size=300, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.zeros(1, 40, dtype=torch.long)
    held = {}

    def prefill():
        held["cache"] = model(ids, logits_to_keep=1, use_cache=True).past_key_values

    assert count_decoder(config, 40) == pytest.approx(counted(prefill), rel=0.02)
    step = counted(lambda: model(ids[:, :1], past_key_values=held["cache"]))
    assert count_decoder(config, 1, 40) == pytest.approx(step, rel=0.02)
    tensors = [tensor for layer in held["cache"].layers for tensor in (layer.keys, layer.values)]
    assert kv_bytes(config, 41, 4) == sum(tensor.nbytes for tensor in tensors)


def test_selector_and_projector():
    config = SelectorConfig(width=48, layers=3, heads=4)
    run = counted(lambda: TokenSelector(config).eval().scores(torch.zeros(2, 30, 48)))
    assert count_trunk(config, 30, 2) == pytest.approx(run, rel=0.02)
    llava = llava_config()
    projector = LlavaNextMultiModalProjector(llava).eval()
    assert count_projector(llava, 17) == counted(lambda: projector(torch.zeros(17, 64)))


def llava_config() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=56, patch_size=14),
        text_config=LlamaConfig(**SMALL | {"hidden_size": 96, "num_attention_heads": 6}, vocab_size=300),
        vision_feature_layer=-2,
    )


def test_the_ideal_speedup_grows_as_less_is_kept_and_counts_the_selector():
    config, selector = llava_config(), SelectorConfig(width=64, layers=3, heads=4)
    full = first_token(config, 5, 400, 20)
    ours = [first_token(config, 5, 400, 20, keep, selector=selector) for keep in (0.9, 0.5, 0.1)]
    gains = [each.speedup(full) for each in ours]
    assert gains == sorted(gains) and gains[-1] > 1
    assert first_token(config, 5, 400, 20, 0.5).total == ours[1].total - ours[1].selector


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(TokenselError, match="keep"):
        first_token(llava_config(), 5, 400, 20, 1.5)
    with pytest.raises(TokenselError, match="as wide as the model"):
        count_decoder(LlamaConfig(**SMALL, head_dim=32), 10)
