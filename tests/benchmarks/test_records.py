"""Records of an evaluation: nothing is computed twice, nothing is lost, outdated answers are not reused."""

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
from suite_tiny import answers
from tiny import WIDTH

import tokensel
from tokensel.benchmarks import answering, runner
from tokensel.benchmarks.records import append_records, read_records, sole_writer
from tokensel.benchmarks.runner import evaluate
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.utils.errors import TokenselError
from tokensel.utils.provenance import CODE, _meaning, checkpoint_digest


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


def test_changed_questions_or_pictures_are_refused(config, monkeypatch):
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


def test_the_code_digest_covers_what_answering_imports():
    """Every module of the package that the methods reach, but those that only load and report."""
    root = Path(tokensel.__file__).parent
    reached, waiting = set(), {"methods"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        path = root / Path(*name.split("."))
        source = (
            path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        ).read_text()
        named = {
            found.removeprefix("tokensel.") for found in re.findall(r"from (tokensel\.[\w.]+) import", source)
        }
        waiting |= named - reached
    covered = {name.removesuffix(".py").replace("/", ".") for name in CODE}
    missed = {name for name in reached if not any(f"{name}.".startswith(f"{part}.") for part in covered)}
    assert missed == {"model.base", "utils.devices", "utils.errors", "utils.files", "utils.loading"}


def test_comments_and_docstrings_do_not_change_the_code_digest():
    source = 'def f(x):\n    """Old."""\n    return x + 1  # why\n'
    assert _meaning(source) == _meaning('def f(x):\n    """New."""\n\n    return (x + 1)\n')
    assert _meaning(source) != _meaning(source.replace("+ 1", "+ 2"))
    assert _meaning(source) != _meaning(source.replace("return", "y ="))
