"""A small book in a folder: notebooks, chapters to run, and what a run leaves."""

from pathlib import Path

import nbformat


def notebook(*cells: tuple[str, str], tags: tuple[str, ...] = ("parameters",)) -> nbformat.NotebookNode:
    """Cells as (kind, source); the first code cell gets ``tags``."""
    page = []
    for number, (kind, source) in enumerate(cells):
        cell = nbformat.v4.new_markdown_cell(source) if kind == "md" else nbformat.v4.new_code_cell(source)
        cell.id = f"cell-{number}"
        if kind == "code" and tags:
            cell.metadata["tags"], tags = list(tags), ()
        page.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(
        cells=page, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )


def make_book(root: Path) -> None:
    """One chapter that computes, and one that fails if its parameter ``sound`` is False."""
    (root / "chapters").mkdir()
    (root / "data").mkdir()
    (root / "data" / "weights").write_text("1")
    (root / "tokensel").mkdir()
    (root / "tokensel" / "utils").mkdir()
    (root / "tokensel" / "utils" / "errors.py").write_text('"""Core."""\n\nx = 1\n')
    (root / "requirements.lock").write_text("torch==2.13.0\n")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n"
        "- file: chapters/01_good\n- file: chapters/02_bad\n- file: status\n"
    )
    good = notebook(
        ("md", "# Good\n\n$x^2$ **run time** about 5 s"),
        ("code", "keep: float = 0.3  # kept\nmodel: str = 'm'"),
        ("code", "keep * 10"),
    )
    bad = notebook(
        ("md", "# Bad, **run time** about 2 min"),
        ("code", "sound: bool = True"),
        ("code", "assert sound, 'no sound'"),
    )
    nbformat.write(good, root / "chapters" / "01_good.ipynb")
    nbformat.write(bad, root / "chapters" / "02_bad.ipynb")


DRAWN = """from tokensel.book import open_chapter
open_chapter("03_drawn")
import matplotlib.pyplot as plt
plt.plot([0.1, 0.3], [40.0, 60.0], label="selector")
plt.show()
plt.bar([1], [5], label="bars")
plt.show()"""


def add_drawn(root: Path) -> None:
    """A third chapter, with two figures in one cell."""
    drawn = notebook(("md", "# Drawn **run time** about 5 s"), ("code", "keep: float = 0.3"), ("code", DRAWN))
    drawn.cells[2].metadata["mystnb"] = {"image": {"alt": "A line and a bar."}}
    nbformat.write(drawn, root / "chapters" / "03_drawn.ipynb")
    toc = root / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: chapters/03_drawn\n")


def result_of(root: Path, name: str) -> str:
    cells = nbformat.read(root / "_build" / "chapters" / f"{name}.ipynb", as_version=4).cells
    return cells[-1].outputs[0]["data"]["text/plain"]
