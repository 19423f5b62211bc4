"""The questions of one benchmark in memory, their images still on disk."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from PIL.Image import Image
from PIL.Image import open as open_image

from tokensel.benchmarks.metrics import METRICS
from tokensel.benchmarks.records import Record
from tokensel.benchmarks.table import COLUMNS, Benchmark
from tokensel.data.images import UNREADABLE, as_image
from tokensel.utils.errors import TokenselError, needs

with needs("eval"):
    import datasets

__all__ = ["Images", "Questions", "image_digest", "load_questions", "stable_keys"]

Images = Image | list[Image] | None  # one image, several, or none


@dataclass(frozen=True)
class Questions:
    """All questions of one split; position ``i`` is the same question in every list.

    Attributes:
        benchmark: where they come from.
        ids: unique within the benchmark.
        prompts: the prompts, without chat template.
        answers: the answers that count as right.
        options: those of multiple-choice questions, else empty.
        categories: what each question is about, "" where the benchmark does not say.
        clusters: which rows belong together, see ``Benchmark.aggregate``.
        images: the ``image`` column, encoded, on disk.
        source: where the questions come from, for the provenance; "" where the suite generates them.
    """

    benchmark: Benchmark
    ids: list[str]
    prompts: list[str]
    answers: list[list[str]]
    options: list[list[str]]
    categories: list[str]
    clusters: list[str]
    images: Any
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, i: int) -> Images:
        """Image ``i`` in RGB; a list where a question has several, ``None`` where it has none.

        Raises:
            TokenselError: it cannot be read. No question is left out silently: that would change the score.
        """
        content = self.images[i]["image"]
        try:
            if isinstance(content, list):
                return [as_image(part) for part in content]
            return content and as_image(content)
        except UNREADABLE as error:
            self._unreadable(i, error)

    def size(self, i: int) -> list[tuple[int, int]]:
        """Width and height of the images of question ``i``, from their headers; nothing is decoded."""
        content = self.images[i]["image"]
        try:
            return [_size(part) for part in (content if isinstance(content, list) else [content]) if part]
        except UNREADABLE as error:
            self._unreadable(i, error)

    def _unreadable(self, i: int, error: Exception) -> NoReturn:
        where = f"{self.benchmark.name}, question {self.ids[i]}"
        raise TokenselError(
            f"{where}: its image cannot be read ({error}); restore it, or leave it out of the split"
        ) from None

    def score(self, i: int, prediction: str) -> float:
        """The benchmark's metric on ``prediction``."""
        return METRICS[self.benchmark.metric](prediction, self.answers[i], self.options[i])

    def check_record(self, i: int, record: Record) -> None:
        """Make sure that a record answers question ``i`` as it is asked now.

        Raises:
            TokenselError: the question or its answers have changed since.
        """
        if record.get("question") != self.prompts[i] or record.get("answers") != self.answers[i]:
            self._changed(i)

    def check_image(self, i: int, recorded: str | None) -> None:
        """Make sure that question ``i`` still has the images whose digest was recorded.

        Raises:
            TokenselError: it has other images.
        """
        if image_digest(self.image(i)) != recorded:
            self._changed(i)

    def _changed(self, i: int) -> NoReturn:
        raise TokenselError(
            f"{self.benchmark.name}, question {self.ids[i]}: differs from the one in the records; "
            "the data has changed, so give another --out or delete the records"
        )


def load_questions(benchmark: Benchmark, split: str, n: int | None) -> Questions:
    """Load a benchmark and write its prompts.

    Raises:
        TokenselError: a missing column, no rows, an id that occurs twice, or a question without answers.
    """
    data = benchmark.load(split, n)
    if missing := [column for column in COLUMNS if column not in data.column_names]:
        raise TokenselError(f"benchmark {benchmark.name}: its data has no column {missing[0]!r}")
    if len(data) == 0:
        raise TokenselError(f"benchmark {benchmark.name}: split {split!r} has no questions")
    features = data.features["image"]
    # encoded bytes that stay on disk: an image is read when it is needed
    encoded = datasets.Image(decode=False)
    images = data.select_columns("image").cast_column(
        "image", datasets.List(encoded) if isinstance(features, datasets.List) else encoded
    )
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
        answers=[_answers(benchmark, row) for row in rows],
        options=[list(row.get("options") or ()) for row in rows],
        categories=[row.get("category") or "" for row in rows],
        clusters=[row.get("cluster") or "" for row in rows],
        images=images,
        source=data.info.description or "",
    )


def _answers(benchmark: Benchmark, row: Mapping[str, Any]) -> list[str]:
    answers = row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise TokenselError(
            f"{benchmark.name}, question {row['question_id']}: its answers are {answers!r}; "
            "give a list with at least one text, or leave the question out of the split"
        )
    return list(answers)


def _size(content: dict[str, Any]) -> tuple[int, int]:
    with open_image(content["path"] if content["bytes"] is None else io.BytesIO(content["bytes"])) as image:
        return image.size


def image_digest(image: Images) -> str | None:
    """Sixteen hexadecimal digits that identify the pixels of one image or several; ``None`` for none."""
    if image is None:
        return None
    several = image if isinstance(image, list) else [image]
    return hashlib.blake2b(
        b"".join(f"{part.size}".encode() + part.tobytes() for part in several), digest_size=8
    ).hexdigest()


def stable_keys(ids: Sequence[str]) -> list[int]:
    """A signed 64-bit number for each id, the same on every machine and in every batch."""
    return [
        int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
        for name in ids
    ]
