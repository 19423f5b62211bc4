"""Tests on the stand-in device, in a process of their own: PyTorch keeps a device that is registered."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)  # some ninety tests, two minutes on a quiet core
def test_everything_that_handles_tensors_on_the_stand_in_device():
    here = Path(__file__).parent
    files = sorted(path.name for path in here.glob("on_stand_in*.py"))
    files.sort(key="on_stand_in_reached.py".__eq__)  # last: it looks at what the others have run
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "reached", *files]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
