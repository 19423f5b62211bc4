"""Tests on the stand-in device, in a process of their own: PyTorch keeps a device that is registered."""

import subprocess
import sys
from pathlib import Path


def test_figures_and_explorer_on_the_stand_in_device():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_stand_in.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
