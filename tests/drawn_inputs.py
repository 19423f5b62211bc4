"""Draw bad inputs and see what becomes of each: ``python drawn_inputs.py FOLDER COUNT``.

Prints how many of each kind were drawn, and which of them did not end as they should. The kinds are the
methods ``cli_...`` of :class:`Draws` and ``lib_...`` of its base.

Runs in a process of its own, without the type checks that the other tests put on every function, as users do.
"""

import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_origin

from drawn_library import COMMANDS, DEVICES, NAMES, LibraryDraws

from tokensel import cli
from tokensel.utils.errors import TokenselError
from tokensel.utils.options import Field, fields_of

BAD_LISTS = (
    "evaluate --keeps 0.3,0 | evaluate --keeps 0.3;0.5 | cost --keeps 2 | "
    "cost --keeps 0.3,nan | evaluate --seeds 1,-1 | evaluate --seeds 1.5 | "
    "evaluate --seeds 1180591620717411303424 | cost --batch-sizes 1,0 | cost --images 480 | "
    "cost --images 0x5 | cost --images axb | cost --images 4x5x6 | evaluate --methods ful | "
    "evaluate --methods fastv+fastv | evaluate --methods + | evaluate --methods selector | "
    "evaluate --methods dyrate | cost --methods native | evaluate --compare full | "
    "evaluate --compare a:b:c | evaluate --compare a@x:b | evaluate --shard 0/2 | "
    "evaluate --shard 3/2 | evaluate --shard half | train --ps 0.3,2 | train --ps a | "
    "evaluate --benchmarks pages | dyrate --benchmarks page,,pages"
)


class Draws(LibraryDraws):
    """Bad inputs of every kind: those of the library, and those of the command line."""

    def kinds(self) -> dict[str, Callable[[], tuple[Any, Callable[[], Any]]]]:
        """The kinds by name, those of the command line first."""
        names = [name for name in dir(self) if name.startswith(("cli_", "lib_"))]
        return {name: getattr(self, name) for name in names}

    def _command(self, name: str, *more: str, without: str = "") -> tuple[list[str], Callable[[], Any]]:
        out, model = str(self.folder / "out"), str(self.model)
        given = {
            "train": {"--images": str(self.folder / "empty"), "--encoder": model, "--out": out},
            "dyrate": {"--model": model, "--suite": "suite_tiny", "--out": out},
            "evaluate": {"--model": model, "--suite": "suite_tiny", "--methods": "full", "--out": out},
            "cost": {"--model": model, "--out": out},
        }[name]
        pairs = [part for key, value in given.items() if key != without for part in (key, value)]
        words = [name, *pairs, *more]
        return words, lambda: run_command(words)

    def _field(self, wanted: Callable[[Field], bool]) -> tuple[str, Field]:
        found = [(name, f) for name, config in COMMANDS.items() for f in fields_of(config) if wanted(f)]
        return self.random.choice(found)

    def cli_number_out_of_range(self):
        name, field = self._field(lambda f: f.kind in (int, float) and f.option.least is not None)
        value = field.option.least - self.random.choice((1, 2, 10**6))
        return self._command(name, option(field), str(value))

    def cli_number_that_is_none(self):
        name, field = self._field(lambda f: f.kind in (int, float))
        value = self.random.choice(("x", "1,5x", "--", "0x3", "one", "1e", "½", "nan", "inf", "-inf"))
        return self._command(name, f"{option(field)}={value}")

    def cli_choice_that_is_none(self):
        name, field = self._field(lambda f: get_origin(f.kind) is Literal)
        return self._command(name, option(field), self.random.choice(("", "x", "AUTO", "auto ", "None")))

    def cli_list_with_a_bad_entry(self):
        return self._command(*self.random.choice(BAD_LISTS.split(" | ")).split())

    def cli_option_that_is_none(self):
        name = self.random.choice(list(COMMANDS))
        word = "".join(self.random.choices("abcxyz-", k=6)).strip("-") or "x"
        return self._command(name, self.random.choice((f"--no-such-{word}", f"--{word}=1", f"-{word}", word)))

    def cli_required_option_left_out(self):
        name = self.random.choice(list(COMMANDS))
        flags = {
            "train": ("--images", "--encoder", "--out"),
            "dyrate": ("--model", "--suite", "--out"),
            "evaluate": ("--model", "--suite"),
            "cost": ("--model",),
        }[name]
        return self._command(name, without=self.random.choice(flags))

    def cli_model_that_is_none(self):
        name = self.random.choice(("dyrate", "evaluate", "cost"))
        return self._command(name, "--model", self._no_model())

    def cli_selector_that_is_none(self):
        name = self.random.choice(("evaluate", "cost"))
        return self._command(name, "--methods", "selector", "--selector", self._no_model())

    def cli_predictor_that_is_none(self):
        return self._command("evaluate", "--methods", "dyrate", "--dyrate", self._no_model())

    def cli_out_that_cannot_be_written(self):
        name = self.random.choice(("dyrate", "evaluate", "cost"))
        places = ("text.txt", "text.txt/below", "cut.png/below/that")
        more = {"evaluate": ("--n", "1"), "dyrate": ("--n", "1", "--steps", "1", "--layer", "1"), "cost": ()}
        return self._command(name, *more[name], "--out", str(self.folder / self.random.choice(places)))

    def cli_device_that_is_none(self):
        name = self.random.choice(("dyrate", "evaluate", "cost", "train"))
        return self._command(name, f"--device={self.random.choice(DEVICES)}")

    def cli_suite_that_is_none(self):
        name = self.random.choice(("dyrate", "evaluate"))
        suite = self.random.choice(
            ("no_such", "os", "no.such.module", "", ".", "suite_tiny.page", "1", "a b", "json.")
        )
        return self._command(name, "--suite", suite)

    def cli_images_that_are_none(self):
        places = ("empty", "text.txt", "cut.png", "missing", "missing.parquet", "broken")
        names = [name for name in NAMES if name != ".."]  # the images of that folder would do
        place = self.random.choice([*(str(self.folder / each) for each in places), *names])
        return self._command("train", "--images", place)


def option(field: Field) -> str:
    return "--" + field.name.replace("_", "-")


def run_command(words: list[str]) -> None:
    """Run the command line; raises ``TokenselError`` where it ends as it should: one line, or the usage."""
    sys.argv, stderr = ["tokensel", *words], io.StringIO()
    try:
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as end:
        text = stderr.getvalue()
        errors = [line for line in text.splitlines() if line.startswith("error:")]
        assert (end.code == 1 and len(errors) == 1) or (end.code == 2 and "Error" in text), (end.code, text)
        assert "Traceback" not in text, text
        raise TokenselError("refused") from None


def outcomes(draws: Draws, count: int) -> Iterator[dict[str, str]]:
    """What is not as it should be among ``count`` draws, the kinds in turn."""
    kinds = list(draws.kinds().items())
    for number in range(count):
        kind, draw = kinds[number % len(kinds)]
        about, call = draw()
        try:
            call()
        except TokenselError as error:
            if len(str(error).splitlines()) == 1:
                continue
            wrong = f"several lines: {error}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        else:
            wrong = "accepted"
        yield {"kind": kind, "input": str(about)[-300:], "wrong": wrong[:300]}


if __name__ == "__main__":
    draws, count = Draws(Path(sys.argv[1]), seed=0), int(sys.argv[2])
    wrong, kinds = list(outcomes(draws, count)), list(draws.kinds())
    drawn = Counter(kinds[number % len(kinds)] for number in range(count))
    print(json.dumps({"drawn": drawn, "wrong": wrong}))
