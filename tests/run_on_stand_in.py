"""Run the code of chapters as on a machine with a GPU, with the stand-in device in its place.

    python tests/run_on_stand_in.py 07 08 10 [-p n=2 -p longest=4]

Models are loaded on the stand-in, which refuses to meet host tensors. Each chapter runs in a process of its
own. Exits with 1 after an error.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(chapter: str, parameters: list[str]) -> None:
    """Execute the code cells of one chapter, in order.

    Raises:
        SystemExit: a cell raised; its traceback has been printed.
    """
    os.environ |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.chdir(ROOT)
    import warnings

    import stand_in
    from IPython.core.interactiveshell import InteractiveShell

    from tokensel.utils import devices

    checked = devices.check_device
    devices.check_device = lambda device=None: (
        stand_in.DEVICE if device in (None, "auto") else checked(device)
    )  # before the modules that import it by name
    warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
    (path,) = (ROOT / "chapters").glob(f"{chapter}*.ipynb")
    shell = InteractiveShell.instance()
    with stand_in.stand_in():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            done = shell.run_cell("".join(cell["source"]), store_history=True)
            if error := done.error_before_exec or done.error_in_exec:
                print(f"{path.stem}: {type(error).__name__}: {str(error)[:300]}")
                raise SystemExit(1)
            if "parameters" in cell["metadata"].get("tags", []) and parameters:
                shell.run_cell("\n".join(["# Parameters", *parameters]), store_history=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="+", help="numbers, such as 07")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    failed = []
    for chapter in given.chapters:
        started = time.monotonic()
        process = multiprocessing.get_context("spawn").Process(target=run, args=(chapter, given.parameters))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(chapter)
        print(
            f"{chapter}: {'failed' if process.exitcode else 'ok'}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
