"""Fine-tuned models beside the one that they come from: pairs of answers, and the command's models."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tokensel.book.mini import together
from tokensel.book.mini.together import parse_models, record_together, together_config
from tokensel.utils.errors import TokenselError


def test_models_are_named():
    assert parse_models(["stock=a/b", "tuned=c=d"]) == {"stock": "a/b", "tuned": "c=d"}
    for bad in ("stock", "=a", "stock="):
        with pytest.raises(TokenselError, match="give name=folder"):
            parse_models([bad])


def test_the_table_pairs_answers_of_the_same_questions(model, tmp_path):
    asked = together_config("", model.parent / "selector", tmp_path / "answers", [0.3], 6)
    asked = replace(asked, suite="suite_tiny", benchmarks=("page", "choice"))
    table = record_together({"one": str(model), "two": str(model)}, tmp_path / "table.csv", asked, False)
    rows = pd.read_csv(table)
    assert len(rows) == 2 * 2 * 2 and set(rows["method"]) == {"full", "selector"}
    assert (rows[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    one, two = (rows[rows["model"] == name].reset_index(drop=True) for name in ("one", "two"))
    assert one["score"].equals(two["score"]) and one["score"].max() > 0
    assert json.loads((tmp_path / "table.provenance.json").read_text())["models"] == {
        "one": str(model), "two": str(model)
    }  # fmt: skip
    # other answers of the second model change its difference by as much
    configs = {name: replace(asked, model=str(model), name=name) for name in ("one", "two")}
    found = together.recorded_answers

    def shifted(config):
        answers = found(config)
        for part in answers:
            for scores in part.table.scores.values():
                scores -= np.arange(6) * (config.name == "two")
        return answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "recorded_answers", shifted)
        moved = together.compared(configs)
    assert np.allclose(moved.loc[moved["model"] == "two", "difference"], -2.5)
    assert (moved.loc[moved["model"] == "two", "difference_high"] < 0).all()
    assert "control" not in moved

    # a control of the second model: the third, whose answers are those of the first
    configs |= {"three": replace(asked, model=str(model), name="three")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "recorded_answers", shifted)
        paired = together.compared(configs, controls={"two": "three"}).set_index("model")
    assert (paired.loc["two", "control"] == "three").all()
    assert np.allclose(paired.loc["two", "control_difference"], -2.5)
    assert paired.loc[["one", "three"], ["control", "control_difference"]].isna().all(axis=None)
    assert (paired.loc["two", "control_difference_low"] < -2.5).all()


def test_a_control_is_one_of_the_models(tmp_path):
    asked = together_config("", "selector", tmp_path, [0.3], 6)
    with pytest.raises(TokenselError, match="control names 'all': give one of stock, tuned"):
        record_together({"stock": "a", "tuned": "b"}, tmp_path / "t.csv", asked, False, {"tuned": "all"})
