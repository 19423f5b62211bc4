"""The record files of an evaluation: which answers they hold already, and which are missing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.questions import Questions
from tokensel.benchmarks.records import Record, read_records
from tokensel.benchmarks.session import Session
from tokensel.benchmarks.shards import Shard
from tokensel.cost.answers import Work
from tokensel.utils.provenance import json_digest

__all__ = [
    "RecordFile",
    "begin_record",
    "count_missing",
    "load_records",
    "missing_questions",
    "question_scores",
]

_SPOT_CHECKS = 16  # images of recorded questions that are compared before an evaluation resumes


@dataclass
class RecordFile:
    """The answers of one benchmark under one condition: complete on disk, and in memory what the tables need.

    A record holds what was generated and what it took, not its score or cost: these are computed when the
    tables are written, so that a change of a metric or of a formula applies to every answer.

    Attributes:
        path: the file that this process writes.
        predictions, work: by question id, of all answers that exist, whichever process generated them.
        versions: how many answers were generated with which versions of packages.
        seconds: sum over those answers.
    """

    path: Path
    predictions: dict[str, str] = field(default_factory=dict)
    work: dict[str, Work] = field(default_factory=dict)
    versions: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, records: Iterable[Record]) -> None:
        """Take in records that are on the disk."""
        for record in records:
            name = record["question_id"]
            self.predictions[name], self.work[name] = record["prediction"], record["work"]
            self.versions[", ".join(f"{key} {value}" for key, value in record["versions"].items())] += 1
            self.seconds += record["seconds"]


def load_records(
    session: Session, questions: Questions, folder: Path, shard: Shard, *, locked: bool = False
) -> dict[Condition, RecordFile]:
    """The existing records of each condition, after a check that they belong to these questions.

    Args:
        session: the model and its conditions.
        questions: those of one benchmark.
        folder: where the records of all benchmarks lie.
        shard: the part of the evaluation that this process answers.
        locked: whether this process holds the lock and is going to write.

    Raises:
        TokenselError: a record belongs to another question, or a file is damaged.
    """
    benchmark, files = questions.benchmark, {}
    number = {name: i for i, name in enumerate(questions.ids)}
    images: dict[int, str | None] = {}
    for condition in session.config.conditions():
        identity = json_digest(session.identity(condition) | {"max_new_tokens": benchmark.max_new_tokens})
        stem = f"keep-{condition.keep:g}_seed-{condition.seed}_{identity}"
        place = folder / benchmark.name / condition.method
        file = files[condition] = RecordFile(place / f"{stem}{shard.name}.jsonl")
        # a whole evaluation and the shards of one all read each other's files
        for path in [place / f"{stem}.jsonl", *sorted(place.glob(f"{stem}.*-of-*.jsonl"))]:
            for name, record in read_records(path, locked=locked and path == file.path).items():
                if name in number and name not in file.predictions:
                    questions.check_record(number[name], record)
                    images[number[name]] = record["image"]
                    file.add([record])
    for i in sorted(images)[:: max(1, len(images) // _SPOT_CHECKS)]:
        questions.check_image(i, images[i])
    return files


def begin_record(questions: Questions, i: int, condition: Condition, model: str, image: str | None) -> Record:
    """What a record says of its question and condition, before the answer.

    Args:
        questions: those of a benchmark.
        i: the question's number.
        condition: under which it is asked.
        model: the model's name in the table.
        image: the digest of the question's image.
    """
    return {
        "question_id": questions.ids[i],
        "model": model,
        "benchmark": questions.benchmark.name,
        "method": condition.method,
        "keep": condition.keep,
        "seed": condition.seed,
        "question": questions.prompts[i],
        "answers": questions.answers[i],
        "image": image,
    }


def missing_questions(questions: Questions, file: RecordFile) -> list[int]:
    """The questions without an answer in ``file``."""
    return [i for i, name in enumerate(questions.ids) if name not in file.predictions]


def count_missing(questions: Questions, files: dict[Condition, RecordFile]) -> int:
    """How many answers to ``questions`` are missing under all conditions together."""
    return sum(len(missing_questions(questions, file)) for file in files.values())


def question_scores(questions: Questions, files: dict[Condition, RecordFile]) -> dict[Condition, list[float]]:
    """The score of each row of the benchmark under each condition, in its order; no answer may be missing."""
    return {
        condition: [questions.score(i, file.predictions[name]) for i, name in enumerate(questions.ids)]
        for condition, file in files.items()
    }
