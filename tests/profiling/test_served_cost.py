"""Timing servers: what is asked, what the table says, that rounds are kept, and refusals in one line."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import tiny_selector, tiny_vlm

from tokensel.profiling.config import CostConfig
from tokensel.profiling.served import measure_served, served_lines
from tokensel.utils.errors import TokenselError

SIZE, NEW, WAIT = "40x48", 3, 0.06  # seconds until the first token at keep 1


class Handler(BaseHTTPRequestHandler):
    """Streams answers like vLLM; the first token comes the later the more is kept."""

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "tiny", "owned_by": "vllm"}], "version": "0"})

    def reply(self, content):
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.fails:
            self.send_error(500, "no more")
            return
        keep = body["mm_processor_kwargs"]["keep"] if self.server.follows else 1.0
        self.send_response(200)
        self.end_headers()
        time.sleep(WAIT * keep)
        for number in range(body["max_tokens"] + 1):  # the role comes with the first token
            time.sleep(0.005 if number > 1 else 0)
            self.event({"choices": [{"delta": {"content": "a" if number else ""}}]})
        usage = {"prompt_tokens": 20 + int(100 * keep), "completion_tokens": body["max_tokens"]}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content):
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")


@pytest.fixture
def serve():
    servers = []

    def start():
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.bodies, server.follows, server.fails = [], True, False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def config(tmp_path):
    tiny_vlm().model.save_pretrained(tmp_path / "model")
    tiny_selector().save_pretrained(tmp_path / "selector")
    return CostConfig(
        model=str(tmp_path / "model"),
        selector=str(tmp_path / "selector"),
        keeps=(0.5, 0.1),
        images=(SIZE,),
        new_tokens=NEW,
        concurrency=(1, 6),
        warmup=0,
        out=str(tmp_path / "out"),
    )


def test_the_table_compares_each_keep_with_keep_1_of_its_round(config, serve):
    servers = [serve(), serve()]
    config = replace(config, server=tuple(map(url, servers)), selector=None)  # which ranks at no cost
    path = measure_served(config, progress=False)
    report = json.loads(path.read_text())
    rows = report["rows"]
    assert [(row["concurrency"], row["keep"]) for row in rows] == [
        (concurrency, keep) for concurrency in (1, 6) for keep in (1.0, 0.5, 0.1)
    ]
    for row in rows:
        assert row["requests"] == 2 * max(4, row["concurrency"]) and row["rounds"] == 10
        assert row["prompt_tokens"] == 20 + int(100 * row["keep"]) and row["new_tokens"] == NEW
        for clock in ("requests_per_second", "first_token", "further_token"):
            gain = row[clock]["speedup"]
            assert gain["low"] <= gain["median"] <= gain["high"]
            assert row[clock]["of_ideal"] == pytest.approx(gain["median"] / row[clock]["ideal"])
            assert row[clock]["ideal"] == 1 if row["keep"] == 1 else row[clock]["ideal"] > 1
        assert row["first_token"]["median"] > WAIT * row["keep"]
        if row["keep"] == 0.1:  # 60 ms against 6
            assert row["first_token"]["speedup"]["median"] > 1.5
    # as many requests at a time as asked for, and the text of the table has a line for each row
    one = next(row for row in rows if row["concurrency"] == 1)
    six = next(row for row in rows if row["concurrency"] == 6)
    assert six["requests_per_second"]["median"] > 2 * one["requests_per_second"]["median"]
    assert len(list(served_lines(report))) == 1 + len(rows)
    assert len(servers[0].bodies) == len(servers[1].bodies)


def test_no_image_is_sent_twice_at_one_keep_and_all_keeps_see_the_same(config, serve):
    server = serve()
    measure_served(replace(config, server=(url(server),), warmup=1), progress=False)
    images = {}
    for body in server.bodies:
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        images.setdefault(body["mm_processor_kwargs"]["keep"], []).append(image)
    for seen in images.values():
        assert len(seen) == len(set(seen)) and set(seen) == set(images[1.0])


def test_after_a_failure_the_rounds_so_far_are_kept(config, serve):
    server = serve()
    config = replace(config, server=(url(server),), concurrency=(1,))
    path = measure_served(config, progress=False)
    asked = len(server.bodies)
    server.fails = True
    with pytest.raises(TokenselError, match="500"):
        measure_served(replace(config, repetitions=12), progress=False)
    server.fails = False
    measure_served(replace(config, repetitions=12), progress=False)
    again = len(server.bodies) - asked
    assert again < asked / 2
    stock, *shorter = json.loads(path.read_text())["rows"]
    assert stock["rounds"] == 12 and stock["flops"]["selector"] == 0
    assert all(row["flops"]["selector"] > 0 for row in shorter)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"server": ()}, "server is missing"),
        ({"methods": ("random",)}, "methods is"),
        ({"threads": 1}, "threads is 1, which a running server decides"),
        ({"server": ("http://127.0.0.1:9",)}, "correct --server, or start the server first"),
    ],
)
def test_options_that_do_not_fit_are_one_line(config, serve, change, line):
    with pytest.raises(TokenselError, match=line) as caught:
        measure_served(replace(config, **({"server": (url(serve()),)} | change)), progress=False)
    assert "\n" not in str(caught.value)


def test_a_server_that_ignores_the_keep_is_one_line(config, serve):
    server = serve()
    server.follows = False
    with pytest.raises(TokenselError, match="does not follow it; start it with --trust-request-mm-kwargs"):
        measure_served(replace(config, server=(url(server),)), progress=False)
