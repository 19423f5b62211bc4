"""Run chapters headless with papermill: several at a time, and only those whose inputs changed."""

import json
import logging
import multiprocessing
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, cast

import nbformat
import papermill
import torch
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from tokensel.book.site.inputs import digest
from tokensel.book.site.kernel import LoggedKernelManager, unwatched
from tokensel.book.site.parameters import check, declared, from_here, parameters_cell
from tokensel.utils import files
from tokensel.utils.errors import TokenselError


def chapter_paths(root: Path) -> list[Path]:
    """The chapters' notebooks in the order of the table of contents."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    groups = [toc, *toc.get("parts", [])]
    files = [entry["file"] for group in groups for entry in group.get("chapters", [])]
    return [root / f"{file}.ipynb" for file in files if file.startswith("chapters/")]


def select_chapters(root: Path, names: list[str]) -> list[Path]:
    """The chapters that ``names`` mean ("03", "03_selector" or a path), all of them for an empty list.

    Raises:
        TokenselError: a name fits no chapter.
    """
    every = chapter_paths(root)
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        fits = [path for path in every if path.stem == stem or path.stem.startswith(f"{stem}_")]
        if not fits:
            raise TokenselError(f"no chapter '{name}': there are {', '.join(path.stem for path in every)}")
        chosen += fits
    return chosen or every


def parameters_of(path: Path) -> dict[str, dict[str, str]]:
    """The parameters of a chapter by name: type, default and help, as papermill reads them."""
    return papermill.inspect_notebook(str(path))


def is_current(root: Path, path: Path, parameters: dict[str, Any]) -> bool:
    """Whether the executed chapter exists and was made from these inputs."""
    return executed(root, path).is_file() and stamp(root, path).get("digest") == digest(
        root, path, parameters
    )


def executed(root: Path, path: Path) -> Path:
    """Where the executed notebook of the chapter ``path`` belongs."""
    return root / "_build" / "chapters" / path.name


def stamp(root: Path, path: Path) -> dict[str, Any]:
    """What the last complete run of a chapter recorded: digest, seconds, parameters, machine; or nothing."""
    try:
        return json.loads(executed(root, path).with_suffix(".json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def run_chapters(
    root: Path,
    names: list[str],
    parameters: dict[str, Any],
    *,
    force: bool = False,
    jobs: int = 1,
    here: Path | None = None,
) -> None:
    """Run the chapters that are not up to date, ``jobs`` at a time.

    Small matrices do not keep several cores busy, several chapters do. Each gets an equal share of the
    cores; a chapter that measures time has all of them, after the others, with nothing else running.

    Args:
        root: of the clone.
        names: of the chapters, see :func:`select_chapters`.
        parameters: given to all of them.
        force: run those that are up to date, too.
        jobs: chapters at a time.
        here: where the user stands, from which paths among the parameters are seen; the root if left out.

    Raises:
        TokenselError: an unknown chapter, a parameter that is unknown or of another type (before anything
            runs), or a failed cell.
    """
    paths, given = select_chapters(root, names), {}
    for path in paths:
        known = declared(parameters_cell(path))
        check(path.stem, known, parameters)
        given[path] = from_here(known, parameters, here or root, root)
    together, alone = [], []
    for number, path in enumerate(paths, 1):
        label = f"[{number}/{len(paths)}] {path.stem}"
        if not force and is_current(root, path, given[path]):
            print(f"{label}: up to date", flush=True)
        else:
            (alone if measures_time(path) else together).append((root, path, given[path], label))
    jobs = min(jobs, len(together))
    if jobs > 1:
        # the longest first, so that none of them is left over in the end with nothing beside it
        _run_together(sorted(together, key=lambda task: stated_seconds(task[1]), reverse=True), jobs)
    else:
        alone = together + alone
    for task in alone:
        print(f"{task[-1]}: {run_one(*task):.1f} s", flush=True)


def default_jobs() -> int:
    """Chapters at a time by default: two, but one on a machine with a GPU, whose memory they would share."""
    return 1 if torch.cuda.is_available() else min(2, cores())


def measures_time(path: Path) -> bool:
    """Whether the chapter says of itself, in its metadata, that nothing may run beside it."""
    return nbformat.read(path, as_version=4).metadata.get("tokensel", {}).get("measures_time", False)


def stated_seconds(path: Path) -> int:
    """The run time that a chapter promises its reader in its opening, alone on two CPU cores.

    Raises:
        TokenselError: it promises none, or in other words than "**run time** about 20 s" or "2 min".
    """
    said = re.search(r"\*\*run time\*\* about (\d+) (s|min)\b", path.read_text(encoding="utf-8"))
    if said is None:
        raise TokenselError(
            f"{path.name} states no run time: write '**run time** about 20 s' or '2 min' in its opening"
        )
    return int(said[1]) * (60 if said[2] == "min" else 1)


def _run_together(tasks: list[tuple], jobs: int) -> None:
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    left, running = iter(tasks), {}
    with ProcessPoolExecutor(jobs, context, _share_cores, (places, max(1, cores() // jobs))) as pool:
        while True:
            # handed out one by one: after a failure what runs ends and is kept, and nothing else starts
            for task in islice(left, jobs - len(running)):
                with (
                    _ignoring_ctrl_c()
                ):  # a new process inherits that; only a running chapter can be interrupted
                    running[pool.submit(_run_in_pool, *task)] = task[-1]
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                print(f"{running.pop(done)}: {done.result():.1f} s", flush=True)


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_PAUSE = 0.5 if sys.stderr.isatty() else 20.0  # seconds between two updates of a progress bar
_place = 0  # of this process among those that run chapters side by side: the line of its progress bar


def _share_cores(places: SimpleQueue, threads: int) -> None:
    global _place
    _place = places.get()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # kernels inherit it


def _run_in_pool(*task: Any) -> float:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run_one(*task)
    finally:
        signal.signal(signal.SIGINT, before)


def run_one(root: Path, path: Path, parameters: dict[str, Any], label: str) -> float:
    """Execute one chapter and record the run; returns the seconds it took.

    papermill writes after every cell, so it does so in ``_build/running``: a notebook in
    ``_build/chapters`` is whole.

    Raises:
        TokenselError: naming the chapter and the cell that failed, or the end of its kernel; what was
            executed of the notebook is kept.
    """
    inputs = digest(root, path, parameters)
    target, running = executed(root, path), root / "_build" / "running" / path.name
    for folder in (target.parent, running.parent):
        folder.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".json").unlink(missing_ok=True)
    log = running.with_suffix(".log")
    log.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        with (
            unwatched(log),
            tempfile.TemporaryDirectory(prefix="tokensel-", ignore_cleanup_errors=True) as sockets,
        ):
            # no open port; sockets of its own, as two kernels that start at once would pick the same names
            local = {"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}
            papermill.execute_notebook(
                str(path),
                str(running),
                parameters=parameters,
                kernel_name="python3",
                kernel_manager_class=LoggedKernelManager,
                cwd=str(root),
                config=Config(local if os.name == "posix" else {}),
                # papermill hands a dictionary on to tqdm: one line a chapter on a terminal, in a log one
                # now and then
                progress_bar=cast(
                    Any, {"desc": label, "leave": False, "position": _place, "mininterval": _PAUSE}
                ),
            )
    except KeyboardInterrupt:
        # nobody asks the interrupted cell's task for its error any more, and asyncio would print that
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except PapermillExecutionError as error:
        os.replace(running, target)
        raise TokenselError(
            f"{path.relative_to(root)}, cell {error.cell_index + 1}: {error.ename}: "
            f"{_first_line(error.evalue)} (the executed notebook is kept at {target.relative_to(root)})"
        ) from None
    except DeadKernelError:
        raise TokenselError(
            f"{path.relative_to(root)}: its kernel died, perhaps out of memory; its messages are in "
            f"{log.relative_to(root)}"
        ) from None
    seconds = time.monotonic() - started
    os.replace(running, target)
    log.unlink(missing_ok=True)
    files.write_json(
        target.with_suffix(".json"),
        {
            "digest": inputs,
            "seconds": round(seconds, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "parameters": parameters,
            "device": device(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", cores())),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        },
    )
    return seconds


def device() -> str:
    """The machine in words: accelerators if there are any, cores, system."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([*cards, f"{cores()} CPU cores", f"{platform.system()} {platform.machine()}"])


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
