"""Build the pages: gather executed chapters and written pages in one folder, hand it to Jupyter Book."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from tokensel import io
from tokensel.book import api, offline, run, status
from tokensel.errors import TokenselError

JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
PAGES = ("_config.yml", "_toc.yml", "index.md", "references.md", "references.bib", "_static", "_vendor")


def build(root: Path) -> Path:
    """Build ``_build/html`` from the executed chapters; returns the front page.

    Raises:
        TokenselError: a chapter has not been run, Sphinx warned, or a page would ask a network for something.
    """
    source = stage(root)
    build_folder = root / "_build"
    # a kept environment would not repeat a warning that it already gave
    shutil.rmtree(build_folder / ".doctrees", ignore_errors=True)
    shutil.rmtree(build_folder / "html", ignore_errors=True)
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", str(source), "--path-output", str(root)]
    done = subprocess.run([*command, "-W", "-n", "--keep-going", "--quiet"], stdin=subprocess.DEVNULL, check=False)
    index = build_folder / "html" / "index.html"
    if done.returncode != 0 or not index.is_file():
        shutil.rmtree(index.parent, ignore_errors=True)  # pages that look whole would be taken for it
        raise TokenselError("jupyter-book warned or failed (see above): no book was built")
    offline.check(index.parent)
    return index


def stage(root: Path) -> Path:
    """Gather in ``_build/site`` what Jupyter Book reads; returns that folder.

    Raises:
        TokenselError: a chapter has not been run.
    """
    site = root / "_build" / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    for name in PAGES:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copyfile
        copy(root / name, site / name)
    for path in run.chapter_paths(root):
        executed = run.executed(root, path)
        if not run.stamp(root, path) or not executed.is_file():
            raise TokenselError(f"{path.stem} has not been run: python -m tokensel book run {path.stem}")
        page = merge(nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4))
        target = site / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        nbformat.write(page, target)
    if (root / "_build" / "figures").is_dir():
        shutil.copytree(root / "_build" / "figures", site / "figures")
    io.write_text(site / "status.md", status.page(root))
    io.write_text(site / "api.md", api.page(root / "tokensel"))
    return site


def merge(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed cells with the prose of ``source``, which may have been mended since the run.

    papermill's cell with the given parameters stays where it put it: the page shows what was really run.
    """
    outputs = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = []
    for cell in source.cells:
        cells.append(outputs[cell.id] if cell.cell_type == "code" else cell)
        if "parameters" in cell.metadata.get("tags", []):
            cells += injected
    # widget state and papermill's own notes are of no use on a page
    metadata = {key: source.metadata[key] for key in ("kernelspec", "language_info") if key in source.metadata}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)
