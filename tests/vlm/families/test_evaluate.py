"""An evaluation of a model of any family: its own chat template, methods that fit, bytes of its cache."""

import json

import pandas as pd
import pytest
import suite_tiny
import tiny_families

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm

METHODS = ("full", "none", "random", "norm", "fastv")


def settings(folder, out, **changes) -> EvalConfig:
    given = dict(suite="suite_tiny", benchmarks=("page",), methods=METHODS, keeps=(0.3,), n=4, batch_size=2)
    given |= dict(model=str(folder), out=str(out), device="cpu", layer=1)
    return EvalConfig(**given | changes)


@pytest.mark.parametrize("family", tiny_families.MAKERS)
def test_an_evaluation_asks_what_answer_asks(family, tmp_path):
    tiny_families.save(family, tmp_path / "model")
    # no schedule runs inside some of them, and PaliGemma reads no text alone
    unfit = {"gemma3": {"fastv"}, "paligemma": {"fastv", "none"}}.get(family, set())
    methods = tuple(method for method in METHODS if method not in unfit)
    done = evaluate(settings(tmp_path / "model", tmp_path / "out", methods=methods), progress=False)
    table = pd.read_csv(done.table)
    assert sorted(table.method) == sorted(methods)
    assert (table.flops > 0).all() and (table.kv_bytes > 0).all()
    flops = table.set_index("method").flops
    assert flops["norm"] < flops["full"]
    bytes_of = table.set_index("method").kv_bytes
    assert bytes_of["norm"] < bytes_of["full"]
    assert "none" in unfit or bytes_of["none"] < bytes_of["norm"]
    vlm, data = load_vlm(tmp_path / "model", device="cpu"), suite_tiny.load("test", 4, salt=1)
    files = list((tmp_path / "out").rglob("*.jsonl"))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    full = {record["question_id"]: record for record in records if record["method"] == "full"}
    for row in data:
        record = full[row["question_id"]]
        assert record["prediction"] == vlm.answer(row["image"], row["question"], max_new_tokens=10)
    chosen = [record for record in records if record["method"] in ("random", "norm")]
    assert chosen and all(record["n_visual"] < record["n_visual_full"] for record in chosen)


def test_a_method_that_does_not_fit_gets_one_line(tmp_path):
    tiny_families.save("qwen2_5_vl", tmp_path / "model")
    for method, line in (("cls", "no CLS token"), ("downsample", "smaller size limit")):
        with pytest.raises(TokenselError, match=line) as caught:
            evaluate(settings(tmp_path / "model", tmp_path / method, methods=(method,)), progress=False)
        assert "\n" not in str(caught.value)
