"""Bad inputs to the library, drawn one at a time; see ``drawn_inputs``."""

import io
import random
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import suite_tiny
import torch
from PIL import Image
from tiny import noise_image, tiny_vlm

from tokensel import (
    TokenSelector,
    TrainConfig,
    VisionEncoder,
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

COMMANDS = {"train": TrainConfig, "dyrate": DyRateConfig, "evaluate": EvalConfig, "cost": CostConfig}
DEVICES = ("gpu", "cuda:x", "cuda:99", "tpu:0", "cpu:", "0", "")
NAMES = ("nobody/no-such-model", "/no/such/folder", "a b", "..", "x" * 300, "nobody/nothing:train", "é/ü")


class LibraryDraws:
    """Bad inputs to the library. Each ``lib_...`` draws one and returns what it is and how to call it."""

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

    def _no_model(self) -> str:
        return self.random.choice(
            [*NAMES, *(str(self.folder / each) for each in ("empty", "broken", "text.txt"))]
        )

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

    def lib_marked_question(self):
        question, images = self.random.choice(
            (("what", 1), ("<image>", 2), ("<image><image>", 1), ("<image>", 0), ("<video>", 1), ("", 1))
        )
        return f"prompt({question!r}, {images}, marked=True)", lambda: self.vlm.prompt(
            question, images, marked=True
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
