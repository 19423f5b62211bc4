"""Servers on loopback, started as a user starts them, and the answers of the adapter to compare with."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SELECTORS = {"llava-next": "selector", "llava-onevision": "selector-onevision"}  # in data/mini, by model
START = 600  # seconds that a server may take to start on a busy machine


class Engine:
    """A running server: its model and selector, its address, and what it printed."""

    def __init__(self, model: str, log: Path):
        self.model, self.selector = f"data/mini/{model}", f"data/mini/{SELECTORS[model]}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        environment = os.environ | {
            "PYTHONPATH": str(HERE),  # its sitecustomize.py runs in every process of the engine
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "tokensel", "serve", "--model", self.model, "--keep", "0.5"]
        command += ["--selector", self.selector, "--trust-request-mm-kwargs", "--enforce-eager"]
        command += ["--max-model-len", "2048", "--max-num-batched-tokens", "128", "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait(self) -> None:
        end = time.monotonic() + START
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"the server did not start:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.5)

    def stop(self) -> None:
        """End the server and the processes that it started, which are of its session."""
        for number in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@pytest.fixture(scope="session", params=SELECTORS)
def engine(request, tmp_path_factory) -> Iterator[Engine]:
    """A small model at keep 0.5, its prompts read in pieces of 128 tokens; one server at a time."""
    engine = Engine(request.param, tmp_path_factory.mktemp("engine") / "log")
    try:
        engine.wait()
        yield engine
    finally:
        engine.stop()
