"""The status page: versions, machine and run times of the book."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tokensel import __version__
from tokensel.book.site import run

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "matplotlib", "scikit-image")
TOOLS = ("jupyter-book", "myst-nb", "papermill", "sphinx")


def page(root: Path) -> str:
    """The status page in MyST Markdown."""
    rows = [_row(root, path) for path in run.chapter_paths(root)]
    total = sum(run.stamp(root, path).get("seconds", 0.0) for path in run.chapter_paths(root))
    lines = [
        "# Status",
        "",
        f"Built {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {run.device()}.",
        "",
        "## Run time of the chapters",
        "",
        "Chapters that run at the same time share the cores; the stated time is for a chapter alone on two.",
        "",
        "| chapter | seconds | stated | threads | finished (UTC) | parameters changed |",
        "|---|---:|---:|---:|---|---|",
        *rows,
        f"| **together** | {total:.1f} | | | | |",
        "",
        "## Versions",
        "",
        "| package | version |",
        "|---|---|",
        f"| tokensel | {__version__} |",
        f"| Python | {platform.python_version()} |",
        *(f"| {name} | {version(name)} |" for name in PACKAGES + TOOLS),
        "",
    ]
    return "\n".join(lines)


def _row(root: Path, path: Path) -> str:
    stamp = run.stamp(root, path)
    changed = ", ".join(f"`{name} = {value}`" for name, value in stamp.get("parameters", {}).items())
    finished = stamp.get("finished", "").replace("T", " ").removesuffix("+00:00")
    took = f"{stamp.get('seconds', 0.0):.1f} | {run.stated_seconds(path)} | {stamp.get('threads', '')}"
    return f"| [](chapters/{path.name}) | {took} | {finished} | {changed} |"
