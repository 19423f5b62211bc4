"""SIGKILL at drawn moments of a training on images: no file is cut short, and the weights are the same.

TOKENSEL_KILLS=20 in the environment kills twenty times (84 seconds on one busy core).
"""

import os
import subprocess
import sys
from pathlib import Path

from little import clip_tower, cut, save_images

ROOT = Path(__file__).parents[2]
KILLS = os.environ.get("TOKENSEL_KILLS", "6")

# Imports take longer than this training, so they are done once: each run is a fork of this process, which
# itself computes nothing.
CHILD = """
import hashlib, json, os, random, shutil, signal, sys, time
from pathlib import Path
from safetensors import safe_open
from tokensel.training.config import TrainConfig
from tokensel.training.train import train

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
draws = random.Random(0)

def run(out, cached):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(TrainConfig(
                images=str(folder / "images"), encoder=str(folder / "tower"), out=str(out),
                cache=str(out / "cache") if cached else "", steps=16, batch_size=4, layers=1,
                statistics_tiles=8, save_every=3, log_every=2, progress=False, device="cpu",
            ))
            code = 0
        finally:
            os._exit(code)
    return pid

def finished(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def files(out):
    paths = [path for path in out.rglob("*") if path.is_file()]
    return [path for path in paths if not any(p.startswith(".") for p in path.relative_to(out).parts)]

def check_whole(out):
    for path in files(out):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(name) for name in file.keys()]
        elif path.suffix == ".json":
            json.loads(path.read_text())

def weights(out):
    names = ("model.safetensors", "config.json", "README.md")
    paths = [out / part / name for part in ("selector", "reconstructor") for name in names]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

expected, seconds = {}, {}
for cached in (False, True):
    started = time.monotonic()
    assert finished(run(folder / f"whole-{cached}", cached)) == 0
    seconds[cached] = time.monotonic() - started
    expected[cached] = weights(folder / f"whole-{cached}")

delivered, ends, cached, out = 0, 0, False, folder / "killed"
while delivered < kills:
    pid = run(out, cached)
    time.sleep(draws.uniform(0, seconds[cached]))
    os.kill(pid, signal.SIGKILL)  # a child that has ended keeps its number until it is waited for
    code = finished(pid)
    assert code in (0, -signal.SIGKILL), code
    delivered += code != 0
    if out.exists():
        check_whole(out)
    if code == 0 or delivered == kills:
        assert finished(run(out, cached)) == 0
        assert weights(out) == expected[cached], "other weights"
        assert not [path for path in out.rglob(".*.part")], "a partial file is left"
        history = [json.loads(line)["step"] for line in (out / "history.jsonl").read_text().splitlines()]
        assert history == list(range(1, 17)), history
        shutil.rmtree(out)
        cached, ends = not cached, ends + 1
print(delivered, ends)
"""


def test_kills_at_drawn_moments_change_nothing(tmp_path):
    images = save_images(tmp_path / "images", 9)
    cut(images / "2.jpg")
    clip_tower(tmp_path / "tower")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(tmp_path), KILLS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, ends = map(int, done.stdout.split()[-2:])
    assert kills == int(KILLS) and ends >= 1
