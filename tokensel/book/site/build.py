"""Build the pages: gather executed chapters and written pages in one folder, hand it to Jupyter Book."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import nbformat
import yaml

from tokensel.book import explorer
from tokensel.book.site import library_page, numbers, offline, run, status
from tokensel.utils import files
from tokensel.utils.errors import TokenselError

JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
PAGES = (
    "_config.yml",
    "_toc.yml",
    "index.md",
    "glossary.md",
    "references.md",
    "references.bib",
    "_static",
    "_vendor",
)


def build(root: Path) -> Path:
    """Build ``_build/html`` from the executed chapters; returns the front page.

    The pages are made elsewhere and moved there when they are complete and checked: a build that is
    stopped, even by force, leaves no half of a book.

    Raises:
        TokenselError: a chapter has not been run, Sphinx warned, or a page would ask a network for something.
    """
    html, part = root / "_build" / "html", root / "_build" / "part"
    _discard(html)  # if the build fails, old pages would be taken for its result
    # a kept environment would not repeat a warning that it already gave
    _discard(part)
    source = stage(root)
    done = _jupyter_book(part, source, "-W", "-n", "--keep-going", "--quiet")
    pages = part / "_build" / "html"
    if done.returncode != 0 or not (pages / "index.html").is_file():
        print(done.stdout)
        raise TokenselError("jupyter-book warned or failed (see above): no book was built")
    offline.check(pages)
    os.replace(pages, html)
    _discard(part)
    return html / "index.html"


def _discard(folder: Path) -> None:
    """Remove a folder; under its own name it disappears in one step."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
        shutil.rmtree(old, ignore_errors=True)


def _jupyter_book(target: Path, source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        JUPYTER_BOOK,
        "build",
        str(source),
        "--path-output",
        str(target),
        *options,
    ]
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def check_links(root: Path) -> int:
    """Ask every address outside the book whether it is there; returns how many answered. Needs a network.

    Raises:
        TokenselError: a chapter has not been run, or some address does not answer; all of them are named.
    """
    part = root / "_build" / "part"
    _discard(part)
    report = part / "_build" / "linkcheck" / "output.json"
    done = _jupyter_book(part, stage(root), "--builder", "linkcheck", "--quiet")
    if not report.is_file():
        print(done.stdout)
        raise TokenselError("jupyter-book failed (see above): no links were checked")
    links = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    broken = [
        f"{link['filename']}: {link['uri']}" for link in links if link["status"] in ("broken", "timeout")
    ]
    if broken:
        raise TokenselError("no answer from " + "; ".join(sorted(broken)))
    return sum(link["status"] in ("working", "redirected") for link in links)


def launch_links(config: dict, environment: Mapping[str, str]) -> dict:
    """The configuration with a link to open each chapter in Colab, if the repository is known.

    Args:
        config: the content of ``_config.yml``.
        environment: the variables in which GitHub Actions names repository and branch; elsewhere nothing is
            added.
    """
    if "GITHUB_REPOSITORY" not in environment:
        return config
    server = environment.get("GITHUB_SERVER_URL", "https://github.com")
    repository = {
        "url": f"{server}/{environment['GITHUB_REPOSITORY']}",
        "branch": environment.get("GITHUB_REF_NAME", "main"),
    }
    return config | {
        "repository": repository,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


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
    shutil.copyfile(explorer.SCRIPT, site / "_static" / explorer.SCRIPT.name)
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))
    files.write_text(
        site / "_config.yml", yaml.safe_dump(launch_links(config, os.environ), allow_unicode=True)
    )
    for path in run.chapter_paths(root):
        executed = run.executed(root, path)
        if not run.stamp(root, path) or not executed.is_file():
            raise TokenselError(f"{path.stem} has not been run: python -m tokensel book run {path.stem}")
        page = merge(nbformat.read(path, as_version=4), nbformat.read(executed, as_version=4))
        for name, table in numbers.link_figures(page, path.stem).items():
            files.write_text(site / "_static" / "numbers" / name, table)
        target = site / path.relative_to(root)
        target.parent.mkdir(exist_ok=True)
        nbformat.write(page, target)
    if (root / "_build" / "figures").is_dir():
        shutil.copytree(root / "_build" / "figures", site / "figures")
    files.write_text(site / "status.md", status.page(root))
    files.write_text(site / "api.md", library_page.page(root / "tokensel"))
    return site


def merge(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed cells with the prose and the tags of ``source``, which may have been edited since the run.

    papermill's cell with the given parameters stays where it put it, folded: the page shows what was really
    run.
    """
    outputs = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    for cell in injected:
        cell.metadata["tags"] = ["injected-parameters", "hide-cell"]
        cell.metadata["mystnb"] = {
            "code_prompt_show": "Show the parameters given",
            "code_prompt_hide": "Hide them",
        }
    cells = []
    for cell in source.cells:
        if cell.cell_type == "code":
            outputs[cell.id].metadata = cell.metadata
            cell = outputs[cell.id]
        cells.append(cell)
        if "parameters" in cell.metadata.get("tags", []):
            cells += injected
    # widget state and papermill's own notes are of no use on a page
    metadata = {
        key: source.metadata[key] for key in ("kernelspec", "language_info") if key in source.metadata
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)
