"""Evaluation through servers: the same tables as in this process, whatever the servers go through."""

import csv
import itertools
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import suite_tiny
from rule_server import NAME, RuleServer, parts
from suite_tiny import answers

from tokensel import cli
from tokensel.benchmarks import dispatch, server
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.utils.errors import TokenselError


@pytest.fixture
def serve():
    """Start servers; all are stopped after the test."""
    started = []

    def start(rule, port=0):
        started.append(RuleServer(rule, port))
        return started[-1]

    yield start
    for one in started:
        if not one.dead:
            one.kill()
        one.thread.join()
        one.server_close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    """Pauses of milliseconds."""
    monkeypatch.setattr(dispatch, "PAUSE", 0.002)
    monkeypatch.setattr(server, "TIMEOUT", 30.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """An evaluation in this process."""
    folder = tmp_path_factory.mktemp("local")
    config = EvalConfig(
        model=str(suite_tiny.save_models(folder)), selector=str(folder / "selector"), suite="suite_tiny",
        benchmarks=("page", "choice"), methods=("full", "none", "selector"), keeps=(0.2, 0.6),
        compare=("selector:none",), n=11, out=str(folder / "out"),
    )  # fmt: skip
    return config, evaluate(config, progress=False)


@pytest.fixture(scope="module")
def oracle(local):
    """The rule that gives the answers of that evaluation, from the image, the question and the keep."""
    known = {}
    for record in answers(local[0].out).values():
        keep = record["keep"] if record["method"] != "none" else None
        tokens = suite_tiny.BENCHMARKS[record["benchmark"]].max_new_tokens
        image = record["image"] if keep else None
        known[image, record["question"], keep, tokens] = record["prediction"]

    def rule(body):
        assert body["model"] == NAME and body["temperature"] == 0 and "stream" not in body
        images, question, keep = parts(body)
        length = 10 + round(100 * keep) if keep else 10
        if body["max_tokens"] == 1:  # whether the keep is followed
            return "?", length
        return known[images[0] if images else None, question, keep, body["max_tokens"]], length

    return rule


@pytest.fixture
def config(local, tmp_path):
    """The same evaluation through servers that are still to be named."""
    return replace(
        local[0], model=None, selector=None, server=("http://127.0.0.1:1",), concurrency=3,
        methods=("full", "none", "served"), compare=("served:none",), out=str(tmp_path / "out"),
    )  # fmt: skip


def through(config, *servers, **options):
    config = replace(config, server=tuple(one.url for one in servers), **options)
    return evaluate(config, progress=False)


def table(path: Path) -> list[dict]:
    """The rows of a table, without what only a model in this process has."""
    text = path.read_text().replace("selector", "served")
    rows = list(csv.DictReader(text.splitlines()))
    return [{key: value for key, value in row.items() if key not in ("flops", "kv_bytes")} for row in rows]


def check_same(done, local):
    assert table(done.table) == table(local[1].table)
    assert table(done.differences) == table(local[1].differences)


def test_the_table_is_that_of_the_model_in_this_process(config, local, oracle, serve):
    one = serve(oracle)
    done = through(config, one)
    check_same(done, local)
    assert done.computed == 2 * 4 * 11 == len(one.asked()) and len(one.bodies) == done.computed + 2
    records = answers(config.out).values()
    assert {record["model"] for record in records} == {NAME}
    assert {record["server"] for record in records} == {f"{one.url}/v1"}
    assert {record["work"]["prompt_tokens"] for record in records} == {10, 30, 70, 110}
    told = json.loads(done.provenance.read_text())
    assert told["model"]["servers"] == [f"{one.url}/v1"] and told["model"]["engine"] == "rule"
    assert told["answers_by_versions"] == {"engine rule": done.computed}
    assert through(config, one).computed == 0 and len(one.asked()) == done.computed


def test_records_of_servers_and_of_this_process_do_not_mix(config, local, oracle, serve, tmp_path):
    both = {"out": str(tmp_path / "both"), "benchmarks": ("choice",), "methods": ("full",), "compare": ()}
    assert evaluate(replace(local[0], **both), progress=False).computed == 11
    assert through(config, serve(oracle), **both).computed == 11
    assert evaluate(replace(local[0], **both), progress=False).computed == 0


def test_two_servers_one_killed_half_way_and_started_again(config, local, oracle, serve):
    steady, revived, again = serve(oracle), threading.Event(), []
    falling = serve(oracle)

    def fall(body, number):
        if number == 12:
            threading.Thread(target=restart).start()

    def restart():
        falling.kill()
        falling.server_close()
        time.sleep(0.1)
        again.append(serve(oracle, falling.server_port))
        again[0].fault = lambda body, number: revived.set()

    def wait(body, number):  # until the other server is back: half of the answers are left for it
        if number > 44:
            assert revived.wait(30)

    falling.fault, steady.fault = fall, lambda body, number: None
    steady.rule = lambda body: (wait(body, len(steady.bodies)), oracle(body))[1]
    done = through(config, steady, falling)
    check_same(done, local)
    assert len(again[0].asked()) > 3 and falling.dead
    by_server = Counter(record["server"] for record in answers(config.out).values())
    assert set(by_server) == {f"{steady.url}/v1", f"{falling.url}/v1"} and min(by_server.values()) > 10


FAULTS = [
    500, 503, 429, 404, "late", "no JSON", "hang up", "cut", "unfinished", "no text", "no choices",
    "no object",
]  # fmt: skip


def test_what_goes_wrong_is_asked_again_and_never_an_empty_answer(config, local, oracle, serve, monkeypatch):
    monkeypatch.setattr(server, "TIMEOUT", 0.7)
    one, failed = serve(oracle), []

    def fault(body, number):
        if body["max_tokens"] > 1 and number % 4 == 0 and len(failed) < len(FAULTS):
            failed.append(FAULTS[len(failed)])
            return failed[-1]

    one.fault = fault
    done = through(config, one)
    check_same(done, local)
    assert failed == FAULTS and len(one.asked()) >= done.computed + len(FAULTS)


def test_another_server_is_asked_where_one_is_well(config, local, oracle, serve):
    good, bad = serve(oracle), serve(oracle)
    bad.fault = lambda body, number: 500 if body["max_tokens"] > 1 else None
    done = through(config, good, bad)
    check_same(done, local)
    assert len(bad.asked()) >= 1 and len(good.asked()) == done.computed


@pytest.mark.parametrize("status", [500, 400])
def test_what_stays_unanswered_is_one_line_and_asked_alone_the_next_time(
    status, config, oracle, serve, monkeypatch, capsys
):
    """A server that refuses a request itself is not asked again."""
    one = serve(oracle)
    poison = suite_tiny.load("test", 11, salt=1)["question"][2]
    one.fault = lambda body, number: status if body["max_tokens"] > 1 and parts(body)[1] == poison else None
    words = f"evaluate --server {one.url} --concurrency 2 --suite suite_tiny --methods full,served"
    words += " --keeps 0.2 --benchmarks page,choice --n 11 --compare served:full --no-progress"
    words += f" --out {config.out}"
    monkeypatch.setattr(sys, "argv", ["tokensel", *words.split()])

    def ended():
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return (exit_info.value.code or 0, *capsys.readouterr())

    code, _, told = ended()
    asked = [parts(body)[1] for body in one.asked()]
    missing = 44 - len(answers(config.out))
    assert code == 1 and told.startswith(
        f"error: {missing} answers are missing ({one.url}/v1: {status}: fault"
    )
    assert told.count("\n") == 1 and 0 < missing < 22 and not list(Path(config.out).glob("*.csv"))
    if status == 400:
        assert asked.count(poison) == missing
    else:
        assert 5 * missing < asked.count(poison) <= dispatch.ATTEMPTS * missing
    assert all(record["question"] != poison for record in answers(config.out).values())
    one.fault = lambda body, number: None
    before = len(one.asked())
    code, out, _ = ended()
    assert code == 0 and out.startswith(f"{missing} answers asked\n")
    assert len(one.asked()) == before + missing and len(answers(config.out)) == 44


def test_servers_that_die_for_good_end_it_and_the_next_call_goes_on(config, local, oracle, serve):
    one, two = serve(oracle), serve(oracle)
    for mortal in (one, two):
        mortal.fault = lambda body, number, mortal=mortal: "hang up" if number > 20 else None
    with pytest.raises(TokenselError, match=r"answers are missing .*run the same command again"):
        through(config, one, two)
    half = len(answers(config.out))
    assert 30 < half < 40
    three = serve(oracle)  # another server of the same model
    done = through(config, three)
    check_same(done, local)
    assert done.computed == len(three.asked()) == 88 - half


def test_each_server_has_at_most_as_many_requests_as_allowed(config, oracle, serve):
    def start() -> RuleServer:
        together, count = threading.Barrier(4), itertools.count()

        def rule(body):
            if body["max_tokens"] > 1 and next(count) < 4:
                together.wait(20)  # the first four have to be there at the same time
            return oracle(body)

        return serve(rule)

    one, two = start(), start()
    through(config, one, two, concurrency=4)
    assert one.peak == two.peak == 4


def test_shards_share_the_questions(config, local, oracle, serve):
    one = serve(oracle)
    first = through(config, one, shard="2/2")
    assert first.table is None and first.left == 88 - first.computed > 0
    done = through(config, one, shard="1/2")
    check_same(done, local)
    assert done.computed == first.left


def test_a_fixed_keep_fields_of_the_user_and_a_key(config, oracle, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    one = serve(lambda body: (f"{len(parts(body)[0])} images", 5))
    fields = '{"add_special_tokens": true, "mm_processor_kwargs": {"scorer": "norm"}}'
    config = replace(config, methods=("none", "served"), keeps=(), benchmarks=("page",))
    done = through(config, one, server_keep=0.3, body=fields)
    assert [(row["method"], row["keep"]) for row in table(done.table)] == [("none", "0"), ("served", "0.3")]
    assert len(one.bodies) == 22 and {head["Authorization"] for head in one.headers} == {"Bearer secret"}
    assert all(body["add_special_tokens"] for body in one.bodies)
    assert all(body["mm_processor_kwargs"] == {"scorer": "norm"} for body in one.bodies)
    told = {(record["method"], record["prediction"]) for record in answers(config.out).values()}
    assert told == {("none", "0 images"), ("served", "1 images")}
    assert "secret" not in done.provenance.read_text()
    # answers to other requests are other answers
    assert through(config, one, server_keep=0.3).computed == 22
    one.rule = oracle
    assert through(config, one, keeps=(0.2,)).computed == 11 + 11  # no image, no fields: asked with both


def test_rows_with_any_number_of_images(config, serve, monkeypatch):
    from types import ModuleType

    from test_rows_of_images import COUNTS, benchmark

    suite = ModuleType("suite_rows")
    suite.BENCHMARKS = {"rows": benchmark("rows", True)}
    monkeypatch.setitem(sys.modules, "suite_rows", suite)
    one = serve(lambda body: (f"{len(parts(body)[0])} {parts(body)[2]}", round(9 * (parts(body)[2] or 1))))
    through(
        config, one, suite="suite_rows", benchmarks=(), methods=("served",), keeps=(0.5,), compare=(), n=6
    )
    told = {record["question_id"]: record["prediction"] for record in answers(config.out).values()}
    assert told == {f"test-{i}": f"{n or 0} {0.5 if n else None}" for i, n in enumerate(COUNTS)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": "m"}, "model is 'm' and --server is given"),
        ({"selector": "data/mini/selector"}, "selector is 'data/mini/selector' and --server is given"),
        ({"device": "cpu"}, "leave --device out"),
        ({"newline": "row"}, "newline is 'row' and --server"),
        ({"vtw_layer": 3}, "leave --vtw-layer out"),
        ({"batch_size": 4}, "batch_size is 4 and --server"),
        ({"seeds": (0, 1)}, "seeds is"),
        ({"methods": ("full", "random")}, "method random: give methods among full, none, served"),
        ({"server_keep": 0.5}, "keeps is 0.2, 0.6 but --server-keep is 0.5"),
        ({"server_keep": 0.5, "keeps": ()}, "method full: servers that keep 0.5"),
        ({"server": ("localhost:8000",)}, "server is 'localhost:8000': give a URL"),
        ({"server": ("http://a b",)}, "give a URL"),
        ({"server": ("http://me:secret@host",)}, "server host: give its URL without user"),
        ({"server": (), "model": "m"}, "concurrency is 3 without --server"),
        ({"server": (), "concurrency": 32}, "no model: give --model"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"body": "[1]"}, "give a JSON object"),
        ({"body": "{"}, "give a JSON object"),
        ({"body": '{"stream": true}'}, "body has 'stream'"),
        ({"body": '{"mm_processor_kwargs": {"keep": 1}}'}, "body has 'keep'"),
        ({"body": '{"mm_processor_kwargs": 1}'}, "give a JSON object"),
    ],
)
def test_options_that_do_not_fit_are_one_line(change, line, config):
    with pytest.raises(TokenselError, match=line) as caught:
        replace(config, **change)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_servers_that_cannot_be_used_are_one_line(config, oracle, serve):
    one, two, ignoring = serve(oracle), serve(oracle), serve(lambda body: ("", 7))

    def refused(*servers, **options) -> str:
        with pytest.raises(TokenselError) as caught:
            through(config, *servers, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(TokenselError, match="refused; correct --server, or start the server first"):
        evaluate(config, progress=False)
    two.names = ["other"]
    assert "serves other and" in refused(one, two)
    two.names = ["a", "b"]
    assert "serves a, b: give a server with one model" in refused(two)
    two.names = []
    assert "serves no model" in refused(two)
    assert "7 tokens at keep 1 and 7 at keep 0.2, so keep is not followed" in refused(one, ignoring)
    one.fault = lambda body, number: "no usage"
    assert "reports no usage.prompt_tokens" in refused(one)
    one.fault = lambda body, number: 400
    assert "400: fault 400); if requests cannot choose their keep there" in refused(one)
    one.fault = lambda body, number: 500
    assert f"{one.url}/v1: 500: fault 500" in refused(one)
    assert not answers(config.out)
