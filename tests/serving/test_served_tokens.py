"""What the plugin computes without an engine: the same tokens, and as many of them, as the adapter."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SIZES, ask, noise_image, onevision_processor, tiny_learned, tiny_llava, tiny_onevision
from transformers import LlavaConfig

from tokensel.scorers import make_scorer
from tokensel.serving.config import ServeConfig
from tokensel.serving.counting import TokenCounter, served_scorer
from tokensel.serving.pruning import TilePruner
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Vlm, encode, reduce_inputs
from tokensel.vlm.native import switch_off

KEEPS = [1.0, 0.5, 0.3, 0.1]
CHOICES = {
    "budget": ["image", "tile"],
    "thumbnail": ["compete", "keep", "last", "drop"],
    "newline": ["keep", "drop"],
    "neighbours": [0, 2],
}


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def vlm(request) -> Vlm:
    if request.param == "llava_next":
        return Vlm(*tiny_llava(), "tiny")
    model, processor = tiny_onevision(), onevision_processor()
    return Vlm(model, processor, "tiny", switch_off(model, processor))


def pruner(vlm: Vlm, **options) -> TilePruner:
    """A pruner whose engine is the model of transformers."""
    core: Any = vlm.model.base_model
    config = vlm.model.config
    config.tokensel = asdict(ServeConfig("tiny", **options))

    def tower(pixels: torch.Tensor) -> torch.Tensor:
        encoded = replace(encode(vlm.model, ask(vlm, [0])), pixel_values=pixels)
        return encoded.family.run(encoded).tokens

    return TilePruner(config, tower, core.multi_modal_projector, core.image_newline)


def embeds_of(vlm: Vlm, row: int, keep: float, **options) -> torch.Tensor:
    """The visual tokens of a shortened prompt about one image, as the adapter makes it."""
    reduced = reduce_inputs(vlm.model, ask(vlm, [row]), keep=keep, positions="compact", **options)
    return reduced["inputs_embeds"][reduced.visual]


@settings(deadline=None, max_examples=25)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    keep=st.floats(0.01, 1.0),
    choices=st.fixed_dictionaries({name: st.sampled_from(values) for name, values in CHOICES.items()}),
)
def test_images_of_any_size_have_as_many_placeholders_as_kept_tokens(vlm, size, keep, choices):
    counter = TokenCounter(vlm.model.config, ServeConfig("tiny", **choices))
    inputs = vlm.inputs([noise_image(*size)], [vlm.prompt("what?")])
    reduced = reduce_inputs(vlm.model, inputs, make_scorer("norm"), keep, **choices)
    assert counter.count(*size, keep) == int(reduced.visual.sum())


@pytest.mark.parametrize("scorer", ["selector", "random", "apet", "diversity"])
def test_images_and_keeps_of_many_requests_are_embedded_as_each_alone(vlm, scorer, monkeypatch):
    learned = tiny_learned()
    own = make_scorer(scorer, **learned)
    monkeypatch.setattr("tokensel.serving.pruning.served_scorer", lambda config, options: own)
    rows = [(row, keep) for row in range(len(SIZES)) for keep in KEEPS]
    inputs = [ask(vlm, [row]) for row, _ in rows]
    together = pruner(vlm).embed(
        [each["pixel_values"][0] for each in inputs],
        torch.cat([each["image_sizes"] for each in inputs]),
        [keep for _, keep in rows],
    )
    for (row, keep), embeds in zip(rows, together, strict=True):
        expected = embeds_of(vlm, row, keep, scorer=own)
        assert embeds.shape == expected.shape
        torch.testing.assert_close(embeds, expected)


def test_with_nothing_dropped_no_score_is_computed(vlm, monkeypatch):
    pruned = pruner(vlm, scorer="norm")
    monkeypatch.setattr(pruned, "scorer", None)
    inputs = ask(vlm, [1])
    (embeds,) = pruned.embed(inputs["pixel_values"], inputs["image_sizes"], [1.0])
    torch.testing.assert_close(embeds, embeds_of(vlm, 1, 1.0))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"keep": None}, "keep is None: an engine counts the tokens"),
        ({"newline": "row"}, "newline is 'row': an engine counts the tokens"),
        ({"budget": "threshold"}, "budget is 'threshold': an engine counts the tokens"),
        ({"keep": 0.0}, "keep is 0.0: give a number above 0"),
        ({"keep": "half"}, "keep is 'half': give a number above 0"),
    ],
)
def test_what_is_not_known_before_the_tower_runs_is_one_line(options, line):
    with pytest.raises(TokenselError, match=line) as caught:
        ServeConfig("tiny", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scorer", ["cls", "cdpruner"])
def test_a_scorer_that_reads_more_than_the_tokens_is_one_line(vlm, scorer):
    with pytest.raises(TokenselError, match="not at hand where an engine embeds images"):
        served_scorer(vlm.model.config, ServeConfig("tiny", scorer=scorer))


def test_another_family_is_one_line():
    with pytest.raises(TokenselError, match=r"LLaVA-1\.5 is not served yet"):
        TokenCounter(LlavaConfig(), ServeConfig("tiny"))


@pytest.mark.parametrize("given", [None, {"model": "tiny", "keeps": 0.5}])
def test_an_engine_started_without_the_command_is_one_line(vlm, given):
    config = vlm.model.config
    config.tokensel = given
    with pytest.raises(TokenselError, match="hf_overrides"):
        ServeConfig.of(config)
