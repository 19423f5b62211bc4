"""The formulas agree with torch's own FLOP counter, and with the bytes of a real cache."""

import numpy as np
import pytest
import torch
from tiny import ask, cache_argument, tiny_selector, tiny_vlm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector

from tokensel.cost import (
    answer_costs,
    count_answer,
    count_decoder,
    count_projector,
    count_tower,
    count_training,
    count_trunk,
    count_vision,
    first_token,
    held_tokens,
    kv_bytes,
    layers_read,
    step_bytes,
)
from tokensel.data.tower import run_tower
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.schedules import Exponential, FastV, Prompt, Vtw, pruned
from tokensel.scorers import make_scorer
from tokensel.training.autoencoder import Autoencoder
from tokensel.training.config import TrainConfig
from tokensel.utils.errors import TokenselError
from tokensel.vlm import downsample, encode, reduce

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
    held = {"cache": DynamicCache(config=config)}
    name = cache_argument(model)

    def prefill():
        model(ids, logits_to_keep=1, use_cache=True, **{name: held["cache"]})

    assert count_decoder(config, 40) == pytest.approx(counted(prefill), rel=0.02)
    step = counted(lambda: model(ids[:, :1], **{name: held["cache"]}))
    assert count_decoder(config, 1, 40) == pytest.approx(step, rel=0.02)
    tensors = [tensor for layer in held["cache"].layers for tensor in (layer.keys, layer.values)]
    assert kv_bytes(config, 41, 4) == sum(tensor.nbytes for tensor in tensors)


def test_a_tower_that_stops_early_on_smaller_images():
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
    with pruned(model, Prompt(torch.ones_like(ids), visual), FastV(layer=1, keep=0.2)):
        run = counted(lambda: model(ids, logits_to_keep=1, use_cache=True))
    assert count_answer(config, 10, np.array([[50, 10, 10]])) == pytest.approx(run, rel=0.02)


def test_bytes_of_a_step_are_the_weights_and_the_cache():
    config = MistralConfig(**SMALL, num_key_value_heads=2, vocab_size=300, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config)
    read = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    assert step_bytes(config, 0) == 2 * read
    assert step_bytes(config, 70, 3, 4) == 4 * read + 3 * kv_bytes(config, 70, 4)


def test_training_takes_about_three_times_going_forth():
    choices = TrainConfig(layers=2, heads=4)
    model, features = Autoencoder(64, *choices.shape), torch.randn(2, 36, 64)

    def step():
        with torch.enable_grad():
            reconstructed, _ = model(features, None, 1.0, torch.zeros(2, 36, 2))
            reconstructed.square().sum().backward()

    # a little less: nothing goes back into the features, and recomputed attention is more
    assert count_training(model.selector.config, 36, 2) == pytest.approx(counted(step), rel=0.05)


@pytest.mark.parametrize("schedule", [None, FastV(1, 0.3), Vtw(2), Exponential(1, 0.8)], ids=str)
def test_an_answer_from_which_tokens_leave_is_counted_as_it_is_computed(schedule):
    config = LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=300, eos_token_id=None, pad_token_id=0)
    model, steps, text, visual = AutoModelForCausalLM.from_config(config).eval(), 6, 12, 60
    model.generation_config.eos_token_id = None
    mask = torch.ones(1, text + visual, dtype=torch.long)
    where = torch.zeros(1, text + visual, dtype=torch.bool)
    where[:, 4 : 4 + visual] = True
    embeds = torch.randn(1, text + visual, config.hidden_size)
    options = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": steps, "do_sample": False}
    if schedule is None:
        spent = counted(lambda: model.generate(**options))
        left, ranked = np.full((steps, 3), visual), []
        whole = count_decoder(config, text + visual) + sum(
            count_decoder(config, 1, text + visual + s) for s in range(steps - 1)
        )
        assert count_answer(config, text, left) == whole
    else:
        with pruned(model, Prompt(mask, where), schedule) as pruning:
            spent = counted(lambda: model.generate(**options))
        left, ranked = torch.stack(pruning.left)[:, :, 0].numpy(), pruning.ranked
        assert len(ranked) == {"fastv": 1, "vtw": 0, "exponential": steps - 1}[schedule.name]
    assert count_answer(config, text, left, ranked) == pytest.approx(spent, rel=0.005)
    assert held_tokens(text, left)[-1, 0] == text + visual + steps - 1


def test_what_an_answer_takes_from_pixels_to_its_end():
    vlm = tiny_vlm()
    encoded, config = encode(vlm.model, ask(vlm, [0, 1, None])), vlm.model.config
    full = reduce(encoded)
    plain = answer_costs(vlm.model, full, output := vlm.generate_output(full, 5))
    for row, (flops, held) in enumerate(plain):
        steps, n = int(output.lengths[row]), int(full["attention_mask"][row].sum())
        tiles = [encoded.layout.tiles[0], encoded.layout.tiles[1], 0][row]
        lm = count_decoder(config.text_config, n) + sum(
            count_decoder(config.text_config, 1, n + s) for s in range(steps - 1)
        )
        seen = count_vision(config.vision_config, tiles, layers_read(config)) + count_projector(
            config, int(full.n_visual[row])
        )
        assert flops == lm + seen and full.n_tiles[row] == tiles
        assert held == pytest.approx(np.mean([kv_bytes(config.text_config, n + s, 4) for s in range(steps)]))
    seeing = encode(vlm.model, ask(vlm, [0, 1]))
    whole, chooser = reduce(seeing), tiny_selector()
    selected = reduce(seeing, make_scorer("selector", selector=chooser), 0.3)
    with_it, without = (
        answer_costs(vlm.model, selected, vlm.generate_output(selected, 5), config)
        for config in (chooser.config, None)
    )
    for row in range(2):
        extra = count_trunk(chooser.config, seeing.layout.tokens, seeing.layout.tiles[row])
        assert with_it[row][0] - without[row][0] == extra
    small = downsample(seeing, 0.3)
    fewer = (answer_costs(vlm.model, each, vlm.generate_output(each, 1)) for each in (small, whole))
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in zip(*fewer))
    thin = answer_costs(vlm.model, whole, vlm.generate_output(whole, 5, schedule=FastV(1, 0.2)))
    thick = answer_costs(vlm.model, whole, vlm.generate_output(whole, 5, schedule=FastV(1, 1.0)))
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in zip(thin, thick))


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
    with pytest.raises(TokenselError, match="tower of a llava_next cannot be counted"):
        count_tower(llava_config(), [(4, 4)])
