"""The questions of one benchmark in memory, their pictures still on disk."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.records import Record
from tokensel.benchmarks.table import COLUMNS, Benchmark
from tokensel.errors import TokenselError


@dataclass(frozen=True)
class Questions:
    """All questions of one split; position ``i`` is the same question in every list.

    Attributes:
        benchmark: where they come from.
        ids: unique within the benchmark.
        prompts: what is put to the model.
        answers: what counts as right.
        options: those of multiple-choice questions, else empty.
        pictures: the ``image`` column, decoded when it is read.
    """

    benchmark: Benchmark
    ids: list[str]
    prompts: list[str]
    answers: list[list[str]]
    options: list[list[str]]
    pictures: Any

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Image.Image:
        """Picture ``i`` in RGB.

        Raises:
            TokenselError: it cannot be read. No question is left out silently: that would change the score.
        """
        try:
            return self.pictures[i]["image"].convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # Pillow has all three for damaged files
            where = f"{self.benchmark.name}, question {self.ids[i]}"
            raise TokenselError(
                f"{where}: its image cannot be read ({error}); restore it, or leave it out of the split"
            ) from None

    def score(self, i: int, prediction: str) -> float:
        """The benchmark's metric on ``prediction``."""
        return METRICS[self.benchmark.metric](prediction, self.answers[i], self.options[i])

    def check_record(self, i: int, record: Record, image: Image.Image | None = None) -> None:
        """Make sure that a record answers question ``i`` as it is asked now.

        Raises:
            TokenselError: the question, its answers or its image have changed since.
        """
        same = record.get("question") == self.prompts[i] and record.get("answers") == self.answers[i]
        if not same or (image is not None and record.get("image") != image_digest(image)):
            raise TokenselError(
                f"{self.benchmark.name}, question {self.ids[i]}: differs from the one in the records; "
                "the data has changed, so give another --out or delete the records"
            )


def load_questions(benchmark: Benchmark, split: str, n: int | None) -> Questions:
    """Load a benchmark and put its prompts.

    Raises:
        TokenselError: a missing column, no rows, or an id that occurs twice.
    """
    data = benchmark.load(split, n)
    if missing := [column for column in COLUMNS if column not in data.column_names]:
        raise TokenselError(f"benchmark {benchmark.name}: its data has no column {missing[0]!r}")
    if len(data) == 0:
        raise TokenselError(f"benchmark {benchmark.name}: split {split!r} has no questions")
    rows = data.remove_columns("image").to_list()
    ids = [str(row["question_id"]) for row in rows]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise TokenselError(
            f"benchmark {benchmark.name}: question id {twice!r} occurs twice; ids must be unique"
        )
    return Questions(
        benchmark=benchmark,
        ids=ids,
        prompts=[benchmark.prompt(row) for row in rows],
        answers=[list(row["answers"]) for row in rows],
        options=[list(row.get("options") or ()) for row in rows],
        pictures=data.select_columns("image"),
    )


def image_digest(image: Image.Image) -> str:
    """Sixteen hexadecimal digits that stand for the pixels."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=8).hexdigest()


def stable_keys(ids: Sequence[str]) -> list[int]:
    """A signed 64-bit number for each id, the same on every machine and in every batch."""
    return [
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
        for name in ids
    ]
