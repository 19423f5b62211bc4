"""Draw bad inputs and see what becomes of each: ``python drawn_inputs.py FOLDER COUNT`` prints what is wrong.

Runs in a process of its own, without the type checks that the other tests put on every function, as users do.
"""

import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_origin

import numpy as np
import suite_tiny
import torch
from PIL import Image
from tiny import noise_image, tiny_vlm

from tokensel import (
    TokenSelector,
    TrainConfig,
    VisionEncoder,
    cli,
    load_vlm,
    make_schedule,
    make_scorer,
    reduce_inputs,
    train,
)
from tokensel.benchmarks.config import EvalConfig
from tokensel.profiling.config import CostConfig
from tokensel.training.config import DyRateConfig
from tokensel.utils.errors import TokenselError
from tokensel.utils.options import Field, fields_of

COMMANDS = {"train": TrainConfig, "dyrate": DyRateConfig, "evaluate": EvalConfig, "cost": CostConfig}
DEVICES = ("gpu", "cuda:x", "cuda:99", "tpu:0", "cpu:", "0", "")
NAMES = ("nobody/no-such-model", "/no/such/folder", "a b", "..", "x" * 300, "nobody/nothing:train", "é/ü")

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


class Draws:
    """Bad inputs of every kind. Each method draws one and returns what to call and how to describe it."""

    def __init__(self, folder: Path, seed: int):
        self.random, self.folder = random.Random(seed), folder
        self.model = suite_tiny.save_models(folder)
        self.vlm = tiny_vlm()
        self.image = noise_image(30, 40)
        (folder / "empty").mkdir()
        (folder / "broken").mkdir()
        (folder / "broken" / "config.json").write_text("{")
        (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
        (folder / "text.txt").write_text("no image")

    def kinds(self) -> dict[str, Callable[[], tuple[Any, Callable[[], Any]]]]:
        """The kinds by name, those of the command line first."""
        names = [name for name in dir(self) if name.startswith(("cli_", "lib_"))]
        return {name: getattr(self, name) for name in names}

    # the command line ------------------------------------------------------------------------------------

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

    def _no_model(self) -> str:
        return self.random.choice(
            [*NAMES, *(str(self.folder / each) for each in ("empty", "broken", "text.txt"))]
        )

    # the library -----------------------------------------------------------------------------------------

    def _anything(self) -> Any:
        return self.random.choice(
            (
                None,
                True,
                -1,
                0,
                2**70,
                1.5,
                -0.5,
                float("nan"),
                float("inf"),
                "",
                "x",
                "0.3",
                b"x",
                (),
                [],
                [None],
                ["x"],
                {},
                {"a": 1},
                object(),
                1j,
                np.int64(-3),
                np.float32(2.5),
                np.zeros(3),
                torch.zeros(2),
                Path("x"),
            )
        )

    def lib_configuration(self):
        config = self.random.choice(list(COMMANDS.values()))
        field, value = self.random.choice(fields(config)), self._anything()
        required = {f.name: "x" for f in fields(config) if f.default is MISSING}

        def call() -> None:
            made = config(**required | {field.name: value})
            taken = getattr(made, field.name)
            if value is None or isinstance(value, (bool, int, float, str, np.number)):
                assert taken == value, f"{value!r} became {taken!r}"
            raise TokenselError("fits")

        return f"{config.__name__}({field.name}={value!r})", call

    def lib_scorer(self):
        name = self.random.choice(("no", "", None, 3, "Selector", "fastv", ["random"]))
        options = self.random.choice(
            ({}, {"sed": 1}, {"seed": "x"}, {"selector": "/no/such"}, {"selector": 3})
        )
        if self.random.random() < 0.5:
            name, options = (
                "selector",
                self.random.choice(({}, {"selector": "/no/such"}, {"selector": 3}, {"selector": None})),
            )
        return f"make_scorer({name!r}, **{options})", lambda: make_scorer(name, **options)

    def lib_schedule(self):
        name = self.random.choice(("no", None, 3, "random", "fastv", "vtw", "dyrate", "fixed", "exponential"))
        options = {self.random.choice(("ratio", "layr", "K")): 1}
        if self.random.random() < 0.5 and name == "fastv":
            options = {"layer": self.random.choice((0, -1, 2.5, "2", None, True)), "keep": 0.5}
        return f"make_schedule({name!r}, **{options})", lambda: make_schedule(name, **options)

    def lib_load_vlm(self):
        options = self.random.choice(
            (
                {"name": self._no_model()},
                {"name": self.model, "device": self.random.choice([d for d in DEVICES if d])},
                {"name": self.model, "dtype": self.random.choice(("bf17", "int8", "", 3, torch.int32))},
                {"name": self.model, "attn": self.random.choice(("flash", "none", "x"))},
                {"name": self.random.choice((None, 3, b"x"))},
            )
        )
        return f"load_vlm(**{options})", lambda: load_vlm(**options)

    def lib_from_pretrained(self):
        kind = self.random.choice((TokenSelector, VisionEncoder))
        name = self._no_model()
        return f"{kind.__name__}.from_pretrained({name!r})", lambda: kind.from_pretrained(name)

    def lib_image(self):
        image = self.random.choice(
            (
                str(self.folder / "cut.png"),
                self.folder / "missing.png",
                str(self.folder),
                b"",
                b"no image",
                3,
                1.5,
                {},
                object(),
                io.BytesIO(b"x"),
                np.zeros(3),
                np.zeros((0, 4, 3)),
                np.zeros((4, 4, 7)),
                torch.zeros(5),
                "http://x.invalid/a.png",
                np.full((4, 4, 3), np.nan),
                Image.new("RGB", (0, 5)),
                {"bytes": None, "path": None},
                np.array(["a"]),
            )
        )
        return f"answer({image!r})", lambda: self.vlm.answer(image, "what", max_new_tokens=1)

    def lib_question(self):
        question = self.random.choice((None, 3, b"what", ["what"], {}, object()))
        return f"answer(question={question!r})", lambda: self.vlm.answer(
            self.image, question, max_new_tokens=1
        )

    def lib_rows(self):
        prompt = self.vlm.prompt("what")
        images, prompts = self.random.choice(
            (
                ([], []),
                ([self.image], []),
                ([], [prompt]),
                ([self.image] * 2, [prompt]),
                ([None], [prompt]),
                (None, [prompt]),
                ([self.image], ["no place"]),
                ([[self.image] * 2], [prompt]),
                ([[self.image] * 2, None], [prompt, prompt]),
                ([self.image], [3]),
                ([self.image], [None]),
                (self.image, [prompt]),
                (3, [prompt]),
            )
        )
        return f"inputs({images!r}, {prompts!r})", lambda: self.vlm.inputs(images, prompts)

    def lib_keep(self):
        keep = self.random.choice(
            (0, 0.0, -1, 1.5, 2, float("nan"), float("inf"), "0.3", True, [0.3], {}, object(), 1j)
        )
        inputs = self.vlm.inputs([self.image], [self.vlm.prompt("what")])
        scorer = make_scorer(self.random.choice(("random", "norm", "uniform", "diversity")))
        return f"keep={keep!r}", lambda: reduce_inputs(self.vlm.model, inputs, scorer, keep)

    def lib_choices(self):
        choices = self.random.choice(
            (
                {"budget": "page"},
                {"thumbnail": None},
                {"newline": 3},
                {"positions": "x"},
                {"budgets": "image"},
                {"thumb": "last"},
                {"newline": ["keep"]},
            )
        )
        inputs = self.vlm.inputs([self.image], [self.vlm.prompt("what")])
        return f"{choices}", lambda: reduce_inputs(
            self.vlm.model, inputs, make_scorer("norm"), 0.5, **choices
        )

    def lib_processor_output(self):
        inputs = dict(self.vlm.inputs([self.image], [self.vlm.prompt("what")]))
        name = self.random.choice(list(inputs))
        changed = self.random.choice(("left out", "NumPy's words", "of another length"))
        if changed == "left out":
            name = self.random.choice(("input_ids", "image_sizes"))
            del inputs[name]
        elif changed == "NumPy's words":
            inputs[name] = np.array(["a"])
        else:
            name = self.random.choice(("input_ids", "image_sizes"))
            inputs[name] = inputs[name][:, :1]
        return f"{name} {changed}", lambda: reduce_inputs(self.vlm.model, inputs, make_scorer("norm"), 0.5)

    def lib_scorer_of_another_type(self):
        scorer = self.random.choice(("selector", "random", 3, [], {}, object(), make_scorer))
        inputs = self.vlm.inputs([self.image], [self.vlm.prompt("what")])
        return f"scorer={scorer!r}", lambda: reduce_inputs(self.vlm.model, inputs, scorer, 0.5)

    def lib_generation(self):
        reduced = reduce_inputs(self.vlm.model, self.vlm.inputs([self.image], [self.vlm.prompt("what")]))
        given = self.random.choice(
            (
                {"max_new_tokens": 0},
                {"max_new_tokens": -1},
                {"max_new_tokens": "4"},
                {"max_new_tokens": 1.5},
                {"schedule": "fastv"},
                {"schedule": 3},
                {"schedule": make_schedule("fastv", layer=99, keep=0.5)},
                {"schedule": make_schedule("fastv", layer=1, keep=0.5), "num_beams": 3},
            )
        )
        return f"generate({given})", lambda: self.vlm.generate(reduced, **given)

    def lib_training(self):
        images = self.random.choice(([], [3], [None], "", 3, None, [b"x"], {}, [object()], [[self.image]]))
        config = TrainConfig(
            encoder=str(self.model), steps=1, layers=1, batch_size=1, statistics_tiles=1, progress=False
        )
        return f"train(images={images!r})", lambda: train(config, images=images)


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
    print(json.dumps(list(outcomes(Draws(Path(sys.argv[1]), seed=0), int(sys.argv[2])))))
