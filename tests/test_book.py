"""The book's machinery: parameters, resume, failures, and pages that need no network."""

from pathlib import Path

import nbformat
import pytest

from tokensel.book import chapter, run
from tokensel.errors import TokenselError

ROOT = Path(__file__).parents[1]


def test_every_chapter_has_one_parameters_cell_and_a_model():
    for path in run.chapter_paths(ROOT):
        cells = nbformat.read(path, as_version=4).cells
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        assert len(tagged) == 1, path.name
        assert "model" in chapter.assigned_names(tagged[0].source), path.name


def test_unknown_parameter_names_the_nearest():
    with pytest.raises(TokenselError, match="'kep'.*'keep'"):
        run.run_chapters(ROOT, ["01"], {"kep": 0.3})
