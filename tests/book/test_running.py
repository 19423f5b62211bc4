"""Running chapters: which ones run, with what, at the same time or alone, and what a failure leaves."""

import os
import shutil

import nbformat
import pytest
from small_book import notebook, result_of

from tokensel.book.site import chapter, run
from tokensel.utils.errors import TokenselError


def test_run_resume_and_parameters(clone, capsys):
    run.run_chapters(clone, ["01"], {})
    assert result_of(clone, "01_good") == "3.0"
    first = run.stamp(clone, clone / "chapters" / "01_good.ipynb")
    assert first["seconds"] > 0 and first["parameters"] == {}
    run.run_chapters(clone, ["01_good"], {})
    assert "up to date" in capsys.readouterr().out
    run.run_chapters(clone, ["chapters/01_good.ipynb"], {"keep": 0.5})
    assert result_of(clone, "01_good") == "5.0"
    assert "injected-parameters" in (clone / "_build" / "chapters" / "01_good.ipynb").read_text()


MEET = """import os, time
from pathlib import Path
mark = Path("_build")
(mark / f"{own}.begun").touch()
until = time.monotonic() + 60
while not (mark / f"{other}.begun").exists():
    assert time.monotonic() < until, "alone"
    time.sleep(0.01)
(mark / f"{own}.ended").touch()
int(os.environ["OMP_NUM_THREADS"])"""


def test_chapters_run_side_by_side_but_those_that_measure_time(clone, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stems = ("01_good", "02_bad", "03_timed")
    for own, other in (stems[:2], stems[1::-1]):
        body = f"own, other = {own!r}, {other!r}\n{MEET}"
        promise = ("md", "**run time** about 5 s")
        nbformat.write(
            notebook(promise, ("code", "keep: float = 0.3"), ("code", body)),
            clone / "chapters" / f"{own}.ipynb",
        )
    ended = "from pathlib import Path\nsorted(path.name for path in Path('_build').glob('*.ended'))"
    timed = notebook(("code", "keep: float = 0.3"), ("code", ended))
    timed.metadata["tokensel"] = {"measures_time": True}
    nbformat.write(timed, clone / "chapters" / "03_timed.ipynb")
    toc = clone / "_toc.yml"
    toc.write_text(
        "format: jb-book\nroot: index\nchapters:\n"
        + "".join(f"- file: chapters/{stem}\n" for stem in reversed(stems))
    )
    (clone / "_build").mkdir()
    run.run_chapters(clone, [], {}, jobs=2)
    assert result_of(clone, "01_good") == result_of(clone, "02_bad") == str(max(1, run.cores() // 2))
    assert result_of(clone, "03_timed") == "['01_good.ended', '02_bad.ended']"
    assert "OMP_NUM_THREADS" not in os.environ and list(clone.glob("*ipc*")) == []


def test_what_makes_a_chapter_stale(clone):
    path = clone / "chapters" / "01_good.ipynb"
    before = run.digest(clone, path, {})
    assert run.digest(clone, path, {"keep": 0.5}) != before
    for name, text in (
        ("tokensel/utils/errors.py", "x = 2\n"),
        ("requirements.lock", "torch==2.14.0\n"),
        ("data/weights", "2"),
    ):
        kept = (clone / name).read_text()
        (clone / name).write_text(text)
        assert run.digest(clone, path, {}) != before, name
        (clone / name).write_text(kept)
    book = nbformat.read(path, as_version=4)
    book.cells[0].source = "# Better"
    nbformat.write(book, path)
    assert run.digest(clone, path, {}) == before, "mended prose needs no new run"
    book.cells[2].source = "keep * 11"
    nbformat.write(book, path)
    assert run.digest(clone, path, {}) != before


def test_failed_cell_is_named_and_kept(clone):
    with pytest.raises(
        TokenselError, match=r"chapters/02_bad.ipynb, cell 4: AssertionError: no sound"
    ) as caught:
        run.run_chapters(clone, ["02"], {"sound": False})  # the given parameters have a cell of their own
    assert "\n" not in str(caught.value)
    kept = clone / "_build" / "chapters" / "02_bad.ipynb"
    assert "no sound" in kept.read_text()
    assert run.stamp(clone, clone / "chapters" / "02_bad.ipynb") == {}


def test_after_a_failure_while_another_chapter_runs_nothing_else_starts(clone):
    for name in ("01_good", "03_late"):
        shutil.copy(clone / "chapters" / "02_bad.ipynb", clone / "chapters" / f"{name}.ipynb")
    toc = clone / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: chapters/03_late\n")
    with pytest.raises(TokenselError, match=r"chapters/0[12]_\w+.ipynb, cell 4: AssertionError: no sound"):
        run.run_chapters(clone, [], {"sound": False}, jobs=2)
    assert not (clone / "_build" / "chapters" / "03_late.ipynb").exists()
    assert [run.stamp(clone, path) for path in run.chapter_paths(clone)] == [{}, {}, {}]


def test_unknown_names_are_refused_before_anything_runs(clone):
    with pytest.raises(TokenselError, match="01_good has no parameter 'kep': did you mean 'keep'"):
        run.run_chapters(clone, ["01"], {"kep": 0.3})
    with pytest.raises(TokenselError, match="02_bad has no parameter 'keep': it has sound"):
        run.run_chapters(clone, [], {"keep": 0.3})
    with pytest.raises(TokenselError, match="no chapter '07': there are 01_good, 02_bad"):
        run.run_chapters(clone, ["07"], {})
    assert not (clone / "_build").exists()


def test_root_is_found_from_below_and_missed_elsewhere(clone, tmp_path_factory):
    assert chapter.find_root(clone / "chapters") == clone
    with pytest.raises(TokenselError, match="clone of the book"):
        chapter.find_root(tmp_path_factory.mktemp("elsewhere"))
