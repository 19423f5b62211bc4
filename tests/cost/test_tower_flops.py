"""For every family: the formula of its tower, and of a whole answer, against torch's own FLOP counter."""

import pytest
import tiny_families
import torch
from test_cost import counted
from tiny import noise_image
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, Qwen3Config

from tokensel.cost import answer_costs, count_decoder, count_tower, count_trunk
from tokensel.cost.answers import answer_work, work_cost
from tokensel.model.selector import SelectorConfig
from tokensel.schedules import FastV, Vtw
from tokensel.scorers import make_scorer
from tokensel.vlm import Vlm, encode, reduce

SIZES = [(40, 48), (24, 56), (64, 20)]


@pytest.fixture(scope="module", params=tiny_families.MAKERS)
def vlm(request, tmp_path_factory) -> Vlm:
    loaded = tiny_families.loaded(request.param, tmp_path_factory.mktemp(request.param))
    loaded.model.generation_config.update(eos_token_id=None)
    return loaded


def ask(vlm: Vlm, images: int):
    shown = [noise_image(*SIZES[i], seed=i) for i in range(images)]
    return vlm.inputs([shown], [vlm.prompt("what is in it?", images)])


@pytest.mark.parametrize("images", [1, 3])
def test_the_tower_with_its_projector(vlm, images):
    encoded = encode(vlm.model, ask(vlm, images))
    spent = counted(lambda: encoded.tower_output)
    assert count_tower(vlm.model.config, encoded.layout.grid.tolist()) == pytest.approx(spent, rel=0.02)


def test_a_whole_answer_with_and_without_dropping(vlm):
    inputs = ask(vlm, 2)
    schedules = [None]
    if vlm.model.config.model_type not in ("gemma3", "paligemma"):  # no schedule runs inside these
        schedules += [FastV(1, 0.3), Vtw(2)]
    full = None
    for keep in (1.0, 0.4):
        for schedule in schedules:
            made = []

            def answer(keep=keep, schedule=schedule, made=made):
                reduced = reduce(encode(vlm.model, inputs), make_scorer("norm"), keep)
                made.append((reduced, vlm.generate_output(reduced, 4, schedule)))

            spent = counted(answer)
            ((flops, _),) = answer_costs(vlm.model, *made[0])
            assert flops == pytest.approx(spent, rel=0.02)
            full = full or flops
    assert flops < full


def test_a_selector_is_counted_tile_by_tile(vlm):
    reduced = reduce(encode(vlm.model, ask(vlm, 2)))
    (work,) = answer_work(vlm.model, reduced, vlm.generate_output(reduced, 2))
    selector = SelectorConfig(width=32, layers=1, heads=4)
    with_it, without = (work_cost(vlm.model.config, work, 4, choice)[0] for choice in (selector, None))
    assert with_it - without == sum(count_trunk(selector, rows * columns) for rows, columns in work["grids"])


@pytest.mark.parametrize("kind", [Qwen3Config, Gemma2Config, Gemma3TextConfig])
def test_language_models_whose_heads_are_not_as_wide_as_they_are(kind):
    shape = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
    config = kind(**shape, num_key_value_heads=2, head_dim=32, vocab_size=300, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.ones(1, 40, dtype=torch.long)
    run = counted(lambda: model(ids, logits_to_keep=1, use_cache=True))
    assert count_decoder(config, 40) == pytest.approx(run, rel=0.02)
