"""Prompts as embeddings: the rows are those of the adapter, and a text model answers from them alone."""

import base64
import io

import pytest
import tiny_families
import torch
from tiny import ask, tiny_vlm
from transformers import LlamaForCausalLM

from tokensel.scorers import make_scorer
from tokensel.serving import embeddings_field, prompt_embeddings
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce_inputs

ROWS = [0, None, [2, 1], 3]  # one image, none, two, one: prompts of four lengths


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def text_model(vlm) -> LlamaForCausalLM:
    """The language model alone, as an engine loads it."""
    model = LlamaForCausalLM(vlm.model.config.text_config).eval()
    model.model.load_state_dict(vlm.model.model.language_model.state_dict())
    model.lm_head.load_state_dict(vlm.model.lm_head.state_dict())
    model.generation_config = vlm.model.generation_config
    return model


@pytest.mark.parametrize("options", [{}, {"newline": "row", "thumbnail": "drop"}, {"keep": 1.0}])
def test_the_rows_are_those_of_the_compact_prompt_without_padding(vlm, options):
    inputs = ask(vlm, ROWS)
    options = {"scorer": make_scorer("norm"), "keep": 0.3} | options
    reduced = reduce_inputs(vlm.model, inputs, positions="compact", **options)
    rows = prompt_embeddings(vlm.model, inputs, **options)
    lengths = reduced["attention_mask"].sum(1).tolist()
    assert [len(row) for row in rows] == lengths and len(set(lengths)) > 1
    for row, padded in zip(rows, reduced["inputs_embeds"], strict=True):
        assert torch.equal(row, padded[len(padded) - len(row) :])


@pytest.mark.parametrize("keep", [0.3, 1.0])
def test_a_text_model_generates_the_same_answer_from_each_row(vlm, text_model, keep):
    inputs, scorer = ask(vlm, ROWS), make_scorer("norm")
    expected = vlm.generate_output(
        reduce_inputs(vlm.model, inputs, scorer, keep, positions="compact"), max_new_tokens=8
    )
    for number, row in enumerate(prompt_embeddings(vlm.model, inputs, scorer, keep)):
        received = torch.load(io.BytesIO(base64.b64decode(embeddings_field(row))), weights_only=True)
        assert torch.equal(received, row)
        mask = torch.ones(1, len(row), dtype=torch.long)
        tokens = text_model.generate(inputs_embeds=received[None], attention_mask=mask, max_new_tokens=8)
        length = int(expected.lengths[number])
        assert torch.equal(tokens[0, :length], expected.tokens[number, :length])


def test_a_prompt_is_sent_without_those_beside_it():
    batch = torch.randn(64, 8, 32)
    assert len(embeddings_field(batch[3])) < batch.numel()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma"])
def test_models_that_read_more_than_embeddings_are_one_line(family, tmp_path):
    vlm = tiny_families.loaded(family, tmp_path)
    with pytest.raises(TokenselError, match="serve it with its own class") as caught:
        prompt_embeddings(vlm.model, ask(vlm, [0]), make_scorer("norm"), 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "choice", [{"positions": "original"}, {"attention": "uniform"}, {"dropped": "blank"}]
)
def test_choices_that_embeddings_cannot_pass_on_are_one_line(vlm, choice):
    with pytest.raises(TokenselError, match="which embeddings cannot pass on: give"):
        prompt_embeddings(vlm.model, ask(vlm, [0]), make_scorer("norm"), 0.5, **choice)
