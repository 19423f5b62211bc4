"""A small book whose chapters run in seconds."""

from pathlib import Path

import pytest
from small_book import make_book

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """The folder of a small book, see ``small_book.make_book``."""
    # its kernels import this checkout: they start where a folder tokensel is no package
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    make_book(tmp_path)
    return tmp_path
