"""A selector that belongs to another vision tower is refused, or warned about where it could still fit."""

import warnings

import pytest
import suite_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, ask, tiny_onevision, tiny_vlm

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.session import EvalSession
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import reduce_inputs


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def selector(**trained):
    return make_scorer("selector", selector=TokenSelector(SelectorConfig(width=WIDTH, heads=4, **trained)))


@given(layer=st.sampled_from([None, -3, -2, -1, 1, 2, 3]), drop_cls=st.sampled_from([None, True, False]))
@settings(deadline=None, max_examples=25)
def test_feature_layer_and_cls_rule_have_to_be_those_of_the_model(vlm, layer, drop_cls):
    scorer = selector(feature_layer=layer, drop_cls=drop_cls)
    fits = layer in (None, -2, 2) and drop_cls in (None, True)  # layer -2 of 3 is layer 2
    if fits:
        scorer.check_model(vlm.model.config)
    else:
        with pytest.raises(TokenselError, match=r"these have .*: give the selector that belongs to"):
            scorer.check_model(vlm.model.config)


def test_reducing_checks_it(vlm):
    for trained in ({"feature_layer": -1}, {"drop_cls": False}):
        with pytest.raises(TokenselError, match="was trained for features of"):
            reduce_inputs(vlm.model, ask(vlm, [0]), selector(**trained), 0.3)
    fitting = selector(feature_layer=-1, drop_cls=False)
    fitting.check_model(tiny_onevision().config)


def test_another_encoder_of_the_same_shape_is_warned_about(vlm):
    config = tiny_vlm().model.config
    config.name_or_path = "/elsewhere/llava-next"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selector(encoder="data/mini/llava-next").check_model(config)  # a copy in another folder
        selector().check_model(config)
    with pytest.warns(UserWarning, match="trained on the vision tower of us/other, and is used with"):
        selector(encoder="us/other").check_model(config)


def test_an_evaluation_checks_it_before_any_question(tmp_path):
    model = suite_tiny.save_models(tmp_path)
    TokenSelector(SelectorConfig(width=WIDTH, heads=4, feature_layer=-1)).save_pretrained(tmp_path / "other")
    config = EvalConfig(
        model=str(model),
        suite="suite_tiny",
        selector=str(tmp_path / "other"),
        methods=("selector",),
        keeps=(0.5,),
    )
    with pytest.raises(TokenselError, match="other was trained for features of feature layer"):
        EvalSession(config).check_fit()
