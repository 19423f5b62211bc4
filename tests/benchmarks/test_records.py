"""Records of an evaluation: nothing is computed twice, nothing is lost, outdated answers are not reused."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import suite_tiny
import torch
from datasets import Dataset, Image
from suite_tiny import answers
from tiny import WIDTH

from tokensel.benchmarks import answering, runner, session
from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.questions import load_questions
from tokensel.benchmarks.records import append_records, read_records, sole_writer
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.session import ANSWERING
from tokensel.benchmarks.table import load_suite
from tokensel.methods import check_method
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.utils.errors import TokenselError
from tokensel.utils.provenance import checkpoint_digest
from tokensel.utils.source import reached_modules


def test_a_second_run_asks_nothing_and_a_larger_one_only_what_is_new(config):
    config = replace(config, benchmarks=("page", "list"))
    first = evaluate(config, progress=False)
    before = first.table.read_bytes()
    again = evaluate(config, progress=False)
    assert again.computed == 0 and again.table.read_bytes() == before
    more = evaluate(replace(config, n=11, keeps=(0.2, 0.4, 0.6)), progress=False)
    assert more.computed == 2 * (2 * 6 + 11 * 2)
    back = evaluate(config, progress=False)
    assert back.computed == 0 and back.table.read_bytes() == before


def test_other_choices_or_another_selector_keep_records_of_their_own(config, model, tmp_path):
    config = replace(config, benchmarks=("page",))
    evaluate(config, progress=False)
    # full and none do not depend on the choices
    assert evaluate(replace(config, positions="compact"), progress=False).computed == 9 * 4
    TokenSelector(SelectorConfig(width=WIDTH, layers=1, heads=4)).save_pretrained(tmp_path / "selector")
    assert evaluate(replace(config, selector=str(tmp_path / "selector")), progress=False).computed == 9 * 2
    assert evaluate(config, progress=False).computed == 0


def test_answers_under_proportional_attention_keep_records_of_their_own(config, monkeypatch):
    config = replace(config, benchmarks=("page",))
    evaluate(config, progress=False)
    cure = replace(config, attention="proportional")
    biases: list[torch.Tensor | None] = []
    stock = session.Vlm.generate_output

    def look(vlm, reduced, *args, **kwargs):
        biases.append(reduced.attn_bias)
        return stock(vlm, reduced, *args, **kwargs)

    monkeypatch.setattr(session.Vlm, "generate_output", look)
    # full and none drop nothing, so that they are not asked again
    assert evaluate(cure, progress=False).computed == 9 * 4
    assert evaluate(replace(cure, strength=0.5), progress=False).computed == 9 * 4
    ours, half = biases[: len(biases) // 2], biases[len(biases) // 2 :]
    for one, other in zip(ours, half, strict=True):
        assert one is not None and other is not None and torch.allclose(one / 2, other)
    for part in (config, cure, replace(cure, strength=0.5)):
        assert evaluate(part, progress=False).computed == 0
    assert evaluate(replace(config, dropped="masked"), progress=False).computed == 9 * 4
    for method in ("downsample", "random+fastv"):
        with pytest.raises(TokenselError, match=f"method {re.escape(method)}: attention 'proportional'"):
            replace(cure, methods=(method,))
    assert replace(cure, methods=("fastv",)).choices()["attention"] == "proportional"


def test_a_checkpoint_is_known_by_its_content_not_by_its_name(model, tmp_path):
    same = tmp_path / "copy"
    same.mkdir()
    for path in model.iterdir():
        (same / path.name).write_bytes(path.read_bytes())
    assert checkpoint_digest(str(same)) == checkpoint_digest(str(model))
    weights = bytearray((same / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (same / "model.safetensors").write_bytes(weights)
    assert checkpoint_digest(str(same)) != checkpoint_digest(str(model))


def test_changed_questions_or_images_are_refused(config, monkeypatch):
    config = replace(config, benchmarks=("page",))
    evaluate(config, progress=False)
    page = suite_tiny.BENCHMARKS["page"]
    monkeypatch.setitem(
        suite_tiny.BENCHMARKS, "page", replace(page, prompt=lambda row: row["question"] + "!")
    )
    with pytest.raises(TokenselError, match="the data has changed"):
        evaluate(config, progress=False)
    monkeypatch.setitem(suite_tiny.BENCHMARKS, "page", page)
    monkeypatch.setattr(suite_tiny, "page", lambda seed, draw=suite_tiny.page: draw(seed).rotate(180))
    with pytest.raises(TokenselError, match="the data has changed"):
        evaluate(config, progress=False)


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(config, tmp_path, monkeypatch):
    config = replace(config, benchmarks=("page", "list"))
    whole = evaluate(config, progress=False)
    asked = []

    def stop_after(limit):
        original = answering._answer

        def answer(*args):
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(args[2])
            return original(*args)

        return answer

    monkeypatch.setattr(answering, "_answer", stop_after(20))
    other = replace(config, out=str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(other, progress=False)
    monkeypatch.undo()
    assert len(asked) == 20
    assert not (tmp_path / "other" / "evaluate.csv").exists()
    before = len(answers(other.out))
    done = evaluate(other, progress=False)
    assert before > 20 and done.computed == whole.computed - before
    assert done.table.read_bytes() == whole.table.read_bytes()
    assert answers(other.out) == answers(config.out)


def test_sigkill_then_the_same_command_again(config, tmp_path):
    """A real process killed at a random moment: same table in the end, at most one batch asked twice."""
    whole = evaluate(config, progress=False)
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "tokensel",
        "evaluate",
        "--model",
        config.model,
        "--selector",
        config.selector,
    ]
    command += [
        "--suite",
        "suite_tiny",
        "--keeps",
        "0.2,0.6",
        "--n",
        "9",
        "--batch-size",
        "4",
        "--out",
        str(out),
    ]
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if sum(len(path.read_bytes().splitlines()) for path in out.rglob("*.jsonl")) >= 40:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    half = answers_of_whole_lines(out)
    assert 40 <= half < len(answers(config.out)) and not (out / "evaluate.csv").exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert (out / "evaluate.csv").read_bytes() == whole.table.read_bytes()
    assert (out / "evaluate.differences.csv").read_bytes() == whole.differences.read_bytes()
    assert answers(out) == answers(config.out)
    told = json.loads((out / "evaluate.provenance.json").read_text())
    assert told["answers_computed_now"] == told["answers"] - half


def answers_of_whole_lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.rglob("*.jsonl"))


def test_a_cut_last_line_is_dropped_and_a_bad_line_within_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    append_records(path, [{"question_id": "a"}, {"question_id": "b"}])
    whole = path.read_bytes()
    for cut in range(1, len(whole) // 2):
        path.write_bytes(whole[:-cut])
        assert list(read_records(path)) == ["a"]
        append_records(path, [{"question_id": "b"}])
        assert path.read_bytes() == whole
    path.write_bytes(b"{\n" + whole)
    with pytest.raises(TokenselError, match="line 1: not a record"):
        read_records(path)
    assert read_records(tmp_path / "none.jsonl") == {}


def test_an_evaluation_waits_for_another_and_takes_what_it_computed(config, tmp_path, monkeypatch):
    config = replace(config, benchmarks=("page",))
    first = evaluate(replace(config, out=str(tmp_path / "first")), progress=False)
    waits = threading.Event()
    monkeypatch.setattr(
        runner, "sole_writer", lambda lock, shard, waiting: sole_writer(lock, shard, waits.set)
    )
    records = tmp_path / "second" / "records" / "page"
    with ThreadPoolExecutor(1) as pool:
        with sole_writer(records / f".lock-{checkpoint_digest(config.model)}"):
            second = pool.submit(evaluate, replace(config, out=str(tmp_path / "second")), progress=False)
            assert waits.wait(timeout=120), "it should not go on while another writes"
            shutil.copytree(tmp_path / "first" / "records" / "page", records, dirs_exist_ok=True)
        assert second.result(timeout=120).computed == 0 < first.computed
    assert second.result().table.read_bytes() == first.table.read_bytes()


def test_a_changed_metric_rescores_every_answer(config, monkeypatch):
    config = replace(config, benchmarks=("page",), methods=("full",), compare=(), n=4)
    evaluate(config, progress=False)
    page = suite_tiny.BENCHMARKS["page"]
    monkeypatch.setitem(METRICS, page.metric, lambda prediction, answers, options=(): 0.25)
    done = evaluate(replace(config, n=9), progress=False)
    (row,) = csv.DictReader(done.table.read_text().splitlines())
    assert done.computed == 5 and float(row["score"]) == 0.25  # not the mean of old and new scores
    monkeypatch.setitem(suite_tiny.BENCHMARKS, "page", replace(page, metric="item_f1"))
    assert evaluate(config, progress=False).computed == 0


def test_changed_cost_formulas_apply_to_every_answer_and_discard_none(config, monkeypatch):
    config = replace(config, benchmarks=("page",), methods=("full",), compare=(), n=4)
    evaluate(config, progress=False)
    monkeypatch.setattr("tokensel.cost.answers.count_projector", lambda config, tokens: 10**15)
    done = evaluate(replace(config, n=5), progress=False)
    (row,) = csv.DictReader(done.table.read_text().splitlines())
    assert done.computed == 1 and float(row["flops"]) >= 10**15


def test_the_versions_that_generated_an_answer_stay_with_it(config, monkeypatch):
    config = replace(config, benchmarks=("page",), methods=("full",), compare=(), n=4)
    evaluate(config, progress=False)
    monkeypatch.setattr(answering, "package_versions", lambda names: dict.fromkeys(names, "9.9"))
    done = evaluate(replace(config, n=7), progress=False)
    counts = json.loads(done.provenance.read_text())["answers_by_versions"]
    assert sorted(counts.values()) == [3, 4] and all(", device cpu (" in versions for versions in counts)
    assert min(counts, key=counts.get).startswith("torch 9.9, transformers 9.9, device ")


def test_an_edit_discards_only_the_answers_that_reach_it():
    random, diversity, fastv = (
        reached_modules([*ANSWERING, *(part.__module__ for part in check_method(name).classes())])
        for name in ("random", "diversity", "fastv")
    )
    assert {
        "tokensel.methods",
        "tokensel.vlm.encode",
        "tokensel.vlm.load",
        "tokensel.scorers.random",
    } <= random
    assert "tokensel.scorers.diversity" in diversity - random
    assert "tokensel.schedules.fastv" in fastv - random and "tokensel.schedules.prune" in random
    unrelated = (
        "tokensel.cost",
        "tokensel.benchmarks",
        "tokensel.training",
        "tokensel.book",
        "tokensel.utils",
    )
    assert not [name for name in random | diversity | fastv if name.startswith(unrelated)]


def test_comparisons_and_empty_lists_are_checked_before_anything_is_computed(config):
    with pytest.raises(TokenselError, match="methods is empty"):
        replace(config, methods=())
    for pair, line in {
        "selctor:random": "compare names 'selctor', which is not run",
        "full:norm": "compare names 'norm', which is not run",
        "selector@0.4:random": "selector is run at keep 0.2, 0.6",
        "random@nan:full": "random is run at keep 0.2, 0.6",
    }.items():
        with pytest.raises(TokenselError, match=re.escape(line)):
            evaluate(replace(config, compare=(pair,)), progress=False)
    assert not answers(config.out)


def test_categories_of_an_earlier_evaluation_do_not_stay(config, tmp_path):
    config = replace(config, benchmarks=("page",), methods=("none",), compare=(), n=2)
    Path(config.out).mkdir()
    old = Path(config.out) / "evaluate.categories.csv"
    old.write_text("model\n")
    assert evaluate(config, progress=False).categories is None and not old.exists()


@pytest.mark.parametrize("bad", [None, []])
def test_missing_answers_name_their_question(monkeypatch, bad):
    page = suite_tiny.BENCHMARKS["page"]

    def load(split, n):
        rows = page.load(split, n).cast_column("image", Image(decode=False)).to_list()
        rows[1]["answers"] = bad
        return Dataset.from_list(rows, features=suite_tiny.COLUMNS)

    with pytest.raises(TokenselError, match=r"page, question test-1: its answers are"):
        load_questions(replace(page, load=load), "test", 3)


def test_a_suite_with_a_missing_field_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "suite_broken.py").write_text(
        "from tokensel.benchmarks import Benchmark\nBENCHMARKS = {'a': Benchmark('a', 'reading', 'anls')}\n"
    )
    (tmp_path / "suite_listed.py").write_text("BENCHMARKS = ['a']\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TokenselError, match=r"suite suite_broken: .*missing.*max_new_tokens"):
        load_suite("suite_broken")
    with pytest.raises(TokenselError, match="suite suite_listed: BENCHMARKS has to be a dictionary"):
        load_suite("suite_listed")
