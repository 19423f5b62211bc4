"""A suite for tests: drawn images of three sizes, questions of different length, nonsense answers."""

import json
import string
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PilImage
from tiny import WIDTH, tiny_learned, tiny_llava

from tokensel.benchmarks import Benchmark
from tokensel.model.selector import SelectorConfig, TokenSelector

SIZES = [(24, 24), (30, 48), (60, 20)]  # (height, width); tiles of the tiny model have 24 pixels
ROWS = 24
COLUMNS = Features(
    image=Image(),
    question=Value("string"),
    answers=List(Value("string")),
    question_id=Value("string"),
    options=List(Value("string")),
)


def page(seed: int) -> PilImage.Image:
    """A page of one colour with a bar across it."""
    rng = np.random.default_rng(seed)
    height, width = SIZES[seed % len(SIZES)]
    pixels = np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)).astype(np.uint8)
    pixels[height // 3 : height // 2] = rng.integers(0, 256, 3)
    return PilImage.fromarray(pixels)


def load(split: str, n: int | None, options: int = 0, salt: int = 0) -> Dataset:
    rows = []
    for i in range(ROWS if n is None else min(n, ROWS)):
        rng = np.random.default_rng([salt, i, len(split)])
        # many, so that a model that writes nonsense still hits some characters
        words = ["".join(rng.choice(list(string.printable[:94]), 8)) for _ in range(20)]
        rows.append(
            dict(
                image=page(int(rng.integers(1000))),
                question="what" + "?" * int(rng.integers(1, 9)),
                answers=["B"] if options else words,
                question_id=f"{split}-{i}",
                options=["sun", "moon", "sea"][:options],
            )
        )
    return Dataset.from_list(rows, features=COLUMNS)


def table(name: str, group: str, metric: str, tokens: int, **kind: int) -> Benchmark:
    return Benchmark(
        name, group, metric, tokens, lambda split, n: load(split, n, **kind), lambda row: row["question"]
    )


BENCHMARKS = {
    "page": table("page", "reading", "similarity", 10, salt=1),
    "choice": table("choice", "general", "option_letter", 3, salt=2, options=3),
    "list": table("list", "long", "item_f1", 14, salt=3),
}


def save_models(folder: Path) -> Path:
    """Write ``tiny-llava`` and trained scorers for it below ``folder``; returns the path of the first."""
    model, processor = tiny_llava()
    model.save_pretrained(folder / "tiny-llava")
    processor.save_pretrained(folder / "tiny-llava")
    TokenSelector(SelectorConfig(width=WIDTH, layers=1, heads=2)).save_pretrained(folder / "selector")
    for name, part in tiny_learned().items():
        if name != "selector":
            part.save_pretrained(folder / name)
    return folder / "tiny-llava"


def answers(out: str | Path) -> dict:
    """All records below ``out``, without what depends on the clock."""
    found = {}
    for path in Path(out, "records").rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            del record["seconds"]
            key = tuple(record[name] for name in ("benchmark", "method", "keep", "seed", "question_id"))
            assert key not in found, "a question was asked twice"
            found[key] = record
    return found
