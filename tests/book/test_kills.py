"""Runs of the book that are stopped, by Ctrl-C and by force: no tracebacks, no partial files, the same pages.

TOKENSEL_KILLS=20 in the environment kills twenty builds. ``python tests/book/test_kills.py 20`` does so too,
and compares the pages with those of a build left alone.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "tokensel", "book")


def write_book(root: Path, code: str) -> None:
    """A book of two chapters that run ``code``."""
    for folder in ("chapters", "data", "tokensel"):
        (root / folder).mkdir(parents=True)
    for name in ("_config.yml", "references.bib", "_static", "_vendor"):
        (root / name).symlink_to(ROOT / name)
    (root / "requirements.lock").touch()
    (root / "index.md").write_text("# A book\n\n{cite}`allakhverdov2025less`\n")
    (root / "glossary.md").write_text("# Glossary\n")
    (root / "references.md").write_text("# References\n\n```{bibliography}\n```\n")
    names = ("chapters/01_a", "chapters/02_b", "glossary", "references", "status")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n" + "".join(f"- file: {name}\n" for name in names)
    )
    for name in names[:2]:
        cells = [
            nbformat.v4.new_markdown_cell(f"# {name} **run time** about 5 s", id="title"),
            nbformat.v4.new_code_cell("keep: float = 0.3", id="given", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell(code, id="code"),
        ]
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), root / f"{name}.ipynb")


def start(root: Path, *words: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *words], cwd=root, env=env, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(what, seconds: float = 200.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.05)


def pages(root: Path) -> dict[str, bytes]:
    """The built pages by name, but for those that state times."""
    html = root / "_build" / "html"
    files = [file for file in html.rglob("*") if file.is_file() and file.suffix in (".html", ".csv")]
    return {str(file.relative_to(html)): file.read_bytes() for file in files if file.name != "status.html"}


def check_whole(root: Path) -> None:
    """After a kill: what lies where results belong is complete."""
    for file in (root / "_build" / "chapters").glob("*.ipynb"):
        nbformat.validate(nbformat.read(file, as_version=4))
    html = root / "_build" / "html"
    if html.exists():
        assert (html / "index.html").read_text().rstrip().endswith("</html>")
        assert (html / "chapters" / "02_b.html").is_file() and (html / "searchindex.js").is_file()


def kill_somewhere(root: Path, delays: random.Random, longest: float) -> str:
    """Start a build, kill it and its process group at a random moment; returns what it had reached."""
    process = start(root, "build", "--jobs", "1")
    try:
        process.communicate(timeout=delays.uniform(0.0, longest))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    check_whole(root)
    build = root / "_build"
    return ", ".join(sorted(path.name for path in build.glob("*"))) if build.exists() else "nothing"


def _build_to_the_end(root: Path) -> None:
    process = start(root, "build", "--jobs", "1")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def test_ctrl_c_ends_two_running_chapters_without_a_traceback(tmp_path):
    write_book(
        tmp_path, "import os, pathlib, time\npathlib.Path(f'{os.getpid()}.begun').touch()\ntime.sleep(300)"
    )
    process = start(tmp_path, "run", "--jobs", "2")
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.begun"))) == 2 or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    kernels = [int(path.stem) for path in tmp_path.glob("*.begun")]
    assert len(kernels) == 2 and process.returncode == 130, output
    assert "Traceback" not in output and "Error" not in output
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in kernels), 30)
    assert list((tmp_path / "_build" / "chapters").glob("*")) == []


@pytest.mark.timeout(1800)
def test_killed_builds_leave_whole_files_and_the_next_one_ends_well(tmp_path):
    write_book(tmp_path, "keep * 10")
    delays = random.Random(0)
    for _ in range(int(os.environ.get("TOKENSEL_KILLS", "2"))):
        kill_somewhere(tmp_path, delays, longest=20.0)
    _build_to_the_end(tmp_path)
    assert {"index.html", "chapters/01_a.html", "chapters/02_b.html"} <= pages(tmp_path).keys()
    assert b"3.0" in pages(tmp_path)["chapters/02_b.html"]
    assert {path.name for path in (tmp_path / "_build").iterdir()} == {"chapters", "html", "running", "site"}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("undisturbed", "killed"):
            write_book(Path(folder) / name, "keep * 10")
        begun = time.monotonic()
        _build_to_the_end(Path(folder) / "undisturbed")
        longest, delays = 1.1 * (time.monotonic() - begun), random.Random(1)
        for number in range(int(sys.argv[1])):
            print(number + 1, kill_somewhere(Path(folder) / "killed", delays, longest), flush=True)
        _build_to_the_end(Path(folder) / "killed")
        assert pages(Path(folder) / "killed") == pages(Path(folder) / "undisturbed")
        print("the same", len(pages(Path(folder) / "killed")), "pages")
