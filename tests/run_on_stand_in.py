"""Run the code of chapters as on a machine with a GPU, with the stand-in device in its place.

    python tests/run_on_stand_in.py all
    python tests/run_on_stand_in.py 07 08 [--whole] [-p n_questions=2]

Models are loaded on the stand-in, which refuses to meet host tensors. ``tests/stand_in_parameters.toml``
makes the chapters short; with ``--whole`` they have the parameters of the book. Each chapter runs in a
process and a folder of its own, so that it finds no answers of an earlier run. Exits with 1 after an error.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = Path(__file__).with_name("stand_in_parameters.toml")


def run(chapter: str, folder: str, parameters: list[str]) -> None:
    """Execute the code cells of one chapter, in order.

    Args:
        chapter: its number, such as "07".
        folder: an empty one, which becomes a clone without results.
        parameters: assignments that replace those of the chapter's cell of parameters.

    Raises:
        SystemExit: a cell raised; its traceback has been printed.
    """
    os.environ |= {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TOKENSEL_UNWATCHED"] = "1"  # no progress bars
    for path in ROOT.iterdir():
        if path.name != "_build":
            (Path(folder) / path.name).symlink_to(path)
    os.chdir(folder)
    import warnings

    import stand_in
    import torch
    from IPython.core.interactiveshell import InteractiveShell

    from tokensel.utils import devices

    checked = devices.check_device
    devices.check_device = lambda device=None: (
        torch.device(stand_in.NAME) if device in (None, "auto") else checked(device)
    )  # before the modules that import it by name
    from tokensel.data.encoders import VisionEncoder

    # the encoder is on the CPU unless a device is named: here it is on the device, which is the harder case
    load_encoder = VisionEncoder.from_pretrained
    VisionEncoder.from_pretrained = lambda name, device=stand_in.DEVICE, **rest: load_encoder(
        name, device, **rest
    )
    warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
    (path,) = Path("chapters").glob(f"{chapter}*.ipynb")
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
    print(f"{path.stem}: {stand_in.count_operations()} operations on the device")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="+", help="numbers, such as 07, or all")
    parser.add_argument("--whole", action="store_true", help="the chapters' own parameters")
    parser.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    short = {} if given.whole else tomllib.loads(SHORT.read_text(encoding="utf-8"))
    chapters = given.chapters
    if chapters == ["all"]:
        chapters = sorted(path.name[:2] for path in (ROOT / "chapters").glob("*.ipynb"))
    failed = []
    for chapter in chapters:
        started = time.monotonic()
        parameters = [f"{name} = {value!r}" for name, value in short.get(chapter, {}).items()]
        with tempfile.TemporaryDirectory() as folder:
            arguments = (chapter, folder, parameters + given.parameters)
            process = multiprocessing.get_context("spawn").Process(target=run, args=arguments)
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
