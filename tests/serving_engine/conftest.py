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
from typing import Any

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from tokensel.book.tiny import write as save
from tokensel.book.tiny.characters import Pair
from tokensel.book.tiny.qwen import qwen2_5_vl

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVED = ("llava-next", "llava-onevision", "qwen2_5_vl")
SELECTORS = {"llava-next": "selector", "llava-onevision": "selector-onevision"}  # in data/mini, by model
START = 600  # seconds that a server may take to start on a busy machine


def random_qwen() -> Pair:
    """Qwen2.5-VL with random weights: heads of a size that the engine has, images of up to 256 tokens."""
    model, processor = qwen2_5_vl(out_hidden_size=128)
    config: Any = model.config
    config.text_config.update(dict(hidden_size=128, intermediate_size=256))
    # a small base, so that places within an image turn all channels of a key
    config.text_config.rope_parameters.update(mrope_section=[4, 6, 6], rope_theta=10.0)
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    return Qwen2_5_VLForConditionalGeneration(config), processor


class Engine:
    """A running server: its model and how it is scored, its address, and what it printed."""

    def __init__(self, model: str, log: Path, folder: Path):
        if model in SELECTORS:
            self.model, self.positions = f"data/mini/{model}", "compact"
            self.scorer = {"scorer": "selector", "selector": f"data/mini/{SELECTORS[model]}"}
        else:
            save(random_qwen, folder)
            self.model, self.positions, self.scorer = str(folder), "original", {"scorer": "norm"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        environment = os.environ | {
            "PYTHONPATH": str(HERE),  # its sitecustomize.py runs in every process of the engine
            "VLLM_NO_USAGE_STATS": "1",
        }
        command = [sys.executable, "-m", "tokensel", "serve", "--model", self.model, "--keep", "0.5"]
        command += [f"--{name}={value}" for name, value in self.scorer.items()]
        command += ["--trust-request-mm-kwargs", "--enforce-eager"]
        # caches that fill up soon: by default images are kept until they take 4 GB
        command += ["--mm-processor-cache-gb", "0.1", "--kv-cache-memory-bytes", "200000000"]
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

    def memory(self) -> int:
        """Bytes of memory that its processes hold."""
        held = 0
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                pages = int((folder / "statm").read_text().split()[1])
            except (OSError, ValueError):  # it has ended
                continue
            if group == self.process.pid:
                held += pages * os.sysconf("SC_PAGE_SIZE")
        return held

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--requests",
        type=int,
        default=160,
        help="of all kinds that a server is asked",
    )


@pytest.fixture(scope="session")
def requests(request) -> int:
    return request.config.getoption("--requests")


@pytest.fixture(scope="session", params=SERVED)
def engine(request, tmp_path_factory) -> Iterator[Engine]:
    """A small model at keep 0.5, its prompts read in pieces of 128 tokens; one server at a time."""
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(request.param, folder / "log", folder / "model")
    try:
        engine.wait()
        yield engine
    finally:
        engine.stop()
