"""SIGKILL at drawn moments of every long command, and the same call again; see ``killed_runs``.

TOKENSEL_KILLS=20 in the environment kills each of them twenty times.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import suite_tiny
from killed_runs import COMMANDS
from little import clip_tower, cut, save_images

TESTS = Path(__file__).parent
KILLS = os.environ.get("TOKENSEL_KILLS", "2")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", COMMANDS)
def test_kills_at_drawn_moments_change_nothing(command, tmp_path):
    if command == "train":
        cut(save_images(tmp_path / "images", 9) / "2.jpg")
        clip_tower(tmp_path / "tower")
    else:
        suite_tiny.save_models(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, TESTS / "killed_runs.py", tmp_path, command, KILLS],
        env=environment,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kills, ends = map(int, done.stdout.split()[-2:])
    assert kills == int(KILLS) and ends >= 1
