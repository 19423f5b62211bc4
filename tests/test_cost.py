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

from tokensel.autoencoder import Autoencoder
from tokensel.cost import (
    count_decoder,
    count_layers,
    count_projector,
    count_training,
    count_trunk,
    count_vision,
    first_token,
    kv_bytes,
    layers_read,
    step_bytes,
)
from tokensel.errors import TokenselError
from tokensel.schedules import FastV, pruned
from tokensel.selector import SelectorConfig, TokenSelector
from tokensel.tower import run_tower
from tokensel.train_config import TrainConfig

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


def test_a_tower_that_stops_early_on_smaller_pictures():
    config = CLIPVisionConfig(**SMALL, image_size=56, patch_size=14)
    tower, pixels = CLIPVisionModel(config).eval(), torch.zeros(2, 3, 56, 28)
    run = counted(lambda: run_tower(tower, pixels, -2, True, interpolate=True))
    assert count_vision(config, 2, layers=2, patches=8) == pytest.approx(run, rel=0.02)
    assert layers_read(llava_config()) == 2 and layers_read(llava_config([1, -1])) == 3


def test_a_language_model_under_a_schedule():
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=300)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.zeros(1, 60, dtype=torch.long)
    visual = torch.zeros(1, 60, dtype=torch.bool)
    visual[:, 5:55] = True
    with pruned(model, visual, torch.ones_like(ids), FastV(layer=1, keep=0.2)):
        run = counted(lambda: model(ids, logits_to_keep=1, use_cache=True))
    assert count_layers(config, [60, 20, 20]) == pytest.approx(run, rel=0.02)


def test_bytes_of_a_step_are_the_weights_and_the_cache():
    config = MistralConfig(**SMALL, num_key_value_heads=2, vocab_size=300, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config)
    read = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert step_bytes(config, 0) == 2 * read
    assert step_bytes(config, 70, 3, 4) == 4 * read + 3 * kv_bytes(config, 70, 4)


def test_training_takes_about_three_times_going_forth():
    choices = TrainConfig(layers=2, heads=4)
    model, features = Autoencoder(64, choices), torch.randn(2, 36, 64)

    def step():
        with torch.enable_grad():
            reconstructed, _ = model(features, None, 1.0, torch.zeros(2, 36, 2))
            reconstructed.square().sum().backward()

    # a little less: nothing goes back into the features, and recomputed attention is more
    assert count_training(model.selector.config, 36, 2) == pytest.approx(counted(step), rel=0.05)


def test_selector_and_projector():
    config = SelectorConfig(width=48, layers=3, heads=4)
    run = counted(lambda: TokenSelector(config).eval().scores(torch.zeros(2, 30, 48)))
    assert count_trunk(config, 30, 2) == pytest.approx(run, rel=0.02)
    llava = llava_config()
    projector = LlavaNextMultiModalProjector(llava).eval()
    assert count_projector(llava, 17) == counted(lambda: projector(torch.zeros(17, 64)))


def llava_config(layer: int | list[int] = -2) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=56, patch_size=14),
        text_config=LlamaConfig(**SMALL | {"hidden_size": 96, "num_attention_heads": 6}, vocab_size=300),
        vision_feature_layer=layer,
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
