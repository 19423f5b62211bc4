"""The record files of an evaluation: which answers they hold already, and which are missing."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.questions import Questions
from tokensel.benchmarks.records import Record, read_records
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.shards import Shard
from tokensel.utils.provenance import json_digest

__all__ = ["RecordFile", "count_missing", "load_records", "missing_questions"]

_SPOT_CHECKS = 16  # images of recorded questions that are compared before an evaluation resumes


@dataclass
class RecordFile:
    """The answers of one benchmark under one condition: complete on disk, in memory their scores and costs.

    Attributes:
        path: the file that this process writes.
        scores: by question id, of all answers that exist, whichever process generated them.
        flops, kv_bytes, seconds: sums over those answers.
    """

    path: Path
    scores: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    kv_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def costs(self) -> tuple[float, float]:
        """FLOPs and bytes of keys and values of an answer, on average."""
        return self.flops / len(self.scores), self.kv_bytes / len(self.scores)

    def add(self, records: Iterable[Record]) -> None:
        """Count records that are on the disk."""
        for record in records:
            self.scores[record["question_id"]] = record["score"]
            self.flops += record["flops"]
            self.kv_bytes += record["kv_bytes"]
            self.seconds += record["seconds"]


def load_records(
    session: EvalSession, questions: Questions, folder: Path, shard: Shard, *, locked: bool = False
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
        task = {"metric": benchmark.metric, "max_new_tokens": benchmark.max_new_tokens}
        identity = json_digest(session.identity(condition) | task)
        stem = f"keep-{condition.keep:g}_seed-{condition.seed}_{identity}"
        place = folder / benchmark.name / condition.method
        file = files[condition] = RecordFile(place / f"{stem}{shard.name}.jsonl")
        # a whole evaluation and the shards of one all read each other's files
        for path in [place / f"{stem}.jsonl", *sorted(place.glob(f"{stem}.*-of-*.jsonl"))]:
            for name, record in read_records(path, locked=locked and path == file.path).items():
                if name in number and name not in file.scores:
                    questions.check_record(number[name], record)
                    images[number[name]] = record["image"]
                    file.add([record])
    for i in sorted(images)[:: max(1, len(images) // _SPOT_CHECKS)]:
        questions.check_image(i, images[i])
    return files


def missing_questions(questions: Questions, file: RecordFile) -> list[int]:
    """The questions without an answer in ``file``."""
    return [i for i, name in enumerate(questions.ids) if name not in file.scores]


def count_missing(questions: Questions, files: dict[Condition, RecordFile]) -> int:
    """How many answers to ``questions`` are missing under all conditions together."""
    return sum(len(missing_questions(questions, file)) for file in files.values())
