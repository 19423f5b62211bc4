"""Kill runs at drawn moments and resume them: ``python killed_runs.py FOLDER COMMAND KILLS``.

COMMAND is train, train-answers, dyrate, finetune, evaluate or cost. Prints how many kills hit a run and how
many runs were finished; an assertion fails where a finished run differs from an undisturbed one.

Imports take longer than these runs, so they are done once: each run is a fork of this process, which itself
computes nothing.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import safe_open
from suite_tiny import answers

from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.runner import evaluate
from tokensel.profiling.config import CostConfig
from tokensel.profiling.inference import measure_inference
from tokensel.training.answers import train_answers
from tokensel.training.config import AnswersConfig, DyRateConfig, TrainConfig
from tokensel.training.dyrate import train_dyrate
from tokensel.training.finetune import FinetuneConfig, finetune
from tokensel.training.train import train

TABLES = ("evaluate.csv", "evaluate.differences.csv")


class Command(ABC):
    """One command on the tiny models.

    Attributes:
        kinds: options of which one set after the other is killed.
    """

    kinds: tuple[dict[str, Any], ...] = ({},)

    def __init__(self, folder: Path):
        self.folder, self.model = folder, str(folder / "tiny-llava")

    @abstractmethod
    def run(self, out: Path, **kind: Any) -> None:
        """Run it in this process, or go on with what is in ``out``."""

    @abstractmethod
    def result(self, out: Path) -> Any:
        """The final numbers: equal for equal runs."""

    def check(self, out: Path, expected: Any) -> None:  # noqa: B027 - most commands need no more
        """What must hold after a kill besides whole files."""


class Train(Command):
    kinds = ({"cached": False}, {"cached": True})

    def run(self, out: Path, *, cached: bool) -> None:
        config = TrainConfig(
            images=str(self.folder / "images"), encoder=str(self.folder / "tower"), out=str(out),
            cache=str(out / "cache") if cached else "", steps=16, batch_size=4, layers=1,
            statistics_tiles=8, save_every=3, log_every=2, progress=False, device="cpu",
        )  # fmt: skip
        train(config)

    def result(self, out: Path) -> Any:
        assert not list(out.rglob(".*.part")), "a partial file is left"
        names = ("model.safetensors", "config.json", "README.md")
        return history(out), digests(
            out / part / name for part in ("selector", "reconstructor") for name in names
        )


class DyRate(Command):
    def run(self, out: Path) -> None:
        config = DyRateConfig(
            model=self.model, suite="suite_tiny", out=str(out), benchmarks=("page", "list"), n=6, layer=1,
            rates=4, steps=12, batch_size=3, save_every=2, progress=False, device="cpu",
        )  # fmt: skip
        train_dyrate(config)

    def result(self, out: Path) -> Any:
        assert not list(out.rglob(".*.part")), "a partial file is left"
        names = ("model.safetensors", "config.json", "README.md")
        return history(out), digests(out / "dyrate" / name for name in names)


class Answers(Command):
    kinds = ({"scorer": "diffprune"}, {"scorer": "visionselector"})

    def run(self, out: Path, *, scorer: str) -> None:
        config = AnswersConfig(
            model=self.model, suite="suite_tiny", out=str(out), benchmarks=("page", "list"), n=6,
            scorer=scorer, steps=12, batch_size=3, save_every=2, progress=False, device="cpu",
        )  # fmt: skip
        train_answers(config)

    def result(self, out: Path) -> Any:
        assert not list(out.rglob(".*.part")), "a partial file is left"
        (card,) = out.glob("*/README.md")
        names = ("model.safetensors", "config.json", "README.md")
        return history(out), digests(card.with_name(name) for name in names)


class Finetune(Command):
    kinds = ({"lora": None}, {"lora": 2})

    def run(self, out: Path, *, lora: int | None) -> None:
        config = FinetuneConfig(
            model=self.model, selector=str(self.folder / "selector"), suite="suite_tiny", out=str(out),
            benchmarks=("page", "list"), n=6, lora=lora, keep=0.2, keep_most=0.7, steps=12, batch_size=3,
            save_every=2, progress=False, device="cpu",
        )  # fmt: skip
        finetune(config)

    def result(self, out: Path) -> Any:
        assert not list(out.glob(".*.part")), "a partial folder is left"
        names = ("model.safetensors", "config.json")
        return history(out), digests(out / "model" / name for name in names)


class Evaluate(Command):
    def run(self, out: Path) -> None:
        config = EvalConfig(
            model=self.model, selector=str(self.folder / "selector"), suite="suite_tiny",
            benchmarks=("page", "choice"), methods=("none", "random", "selector+fastv"), keeps=(0.6,),
            layer=1, n=9, batch_size=3, compare=("selector+fastv:random",), out=str(out), device="cpu",
        )  # fmt: skip
        evaluate(config, progress=False)

    def result(self, out: Path) -> Any:
        told = json.loads((out / "evaluate.provenance.json").read_text())
        # `answers` refuses a question that was asked twice
        return [(out / name).read_bytes() for name in TABLES], answers(out), told["answers"]

    def check(self, out: Path, expected: Any) -> None:
        for name, content in zip(TABLES, expected[0]):
            assert not (out / name).exists() or (out / name).read_bytes() == content, name
        for path in out.rglob("*.jsonl"):  # they grow line by line, and only their last one may be cut
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
        for path in out.rglob(".lock-*"):
            FileLock(path).acquire(blocking=False).lock.release()  # raises where somebody holds it


class Cost(Command):
    def run(self, out: Path) -> None:
        config = CostConfig(
            model=self.model, selector=str(self.folder / "selector"), methods=("selector",),
            keeps=(0.3,), batch_sizes=(1, 2), images=("24x24",), text=7, new_tokens=2, warmup=0, device="cpu",
            out=str(out),
        )  # fmt: skip
        measure_inference(config, progress=False)

    def result(self, out: Path) -> Any:
        """All but the times: those differ from run to run."""
        report = json.loads((out / "cost.json").read_text())
        (rounds,) = (out / "cost.rounds").glob("*.json")  # those of all sittings in one file
        done = [[one["block"], sorted(one["times"])] for one in json.loads(rounds.read_text())]
        names = ("image", "rows", "method", "keep", "repetitions", "n_visual", "length", "flops")
        ideals = [
            [row[clock]["ideal"] for clock in ("first_token", "further_token")] for row in report["rows"]
        ]
        return done, [{name: row[name] for name in names} for row in report["rows"]], ideals

    def check(self, out: Path, expected: Any) -> None:
        for path in out.glob("cost.rounds/*.json"):
            done = [[one["block"], sorted(one["times"])] for one in json.loads(path.read_text())]
            assert done == expected[0][: len(done)]


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "train": Train,
    "train-answers": Answers,
    "dyrate": DyRate,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "cost": Cost,
}


def digests(paths: Any) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def history(out: Path) -> list[dict[str, Any]]:
    """The training's records, without times; their steps are counted without a gap."""
    records = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def check_whole(out: Path) -> None:
    """No file but a hidden one is cut short."""
    paths = [path for path in out.rglob("*") if path.is_file()]
    for path in paths:
        if any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # of a file, not of a dictionary
        elif path.suffix == ".json":
            json.loads(path.read_text())


def fork(command: Command, out: Path, kind: dict[str, Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            command.run(out, **kind)
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, command: Command, kills: int) -> None:
    draws, expected, seconds = random.Random(0), [], []
    for number, kind in enumerate(command.kinds):
        whole = folder / f"whole-{number}"
        started = time.monotonic()
        assert exit_code(fork(command, whole, kind)) == 0
        seconds.append(time.monotonic() - started)
        expected.append(command.result(whole))
    hits, ends, number, out = 0, 0, 0, folder / "killed"
    while hits < kills:
        kind = command.kinds[number]
        pid = fork(command, out, kind)
        time.sleep(draws.uniform(0, seconds[number]))
        os.kill(pid, signal.SIGKILL)  # a child that has ended keeps its number until it is waited for
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL), code
        hits += code != 0
        if out.exists():
            check_whole(out)
            command.check(out, expected[number])
        if code == 0 or hits == kills:
            assert exit_code(fork(command, out, kind)) == 0
            assert command.result(out) == expected[number], "other numbers"
            command.check(out, expected[number])
            shutil.rmtree(out)
            number, ends = (number + 1) % len(command.kinds), ends + 1
    print(hits, ends)


if __name__ == "__main__":
    main(Path(sys.argv[1]), COMMANDS[sys.argv[2]](Path(sys.argv[1])), int(sys.argv[3]))
