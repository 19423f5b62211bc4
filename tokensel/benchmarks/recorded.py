"""The recorded answers of an evaluation, question by question: what the tables average away.

A table says how often a method is right. Which questions it gets right is in the records. This file reads
them, and picks the difficult questions: those that a smaller image no longer answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import load_questions
from tokensel.benchmarks.record_files import count_missing, load_records, question_scores
from tokensel.benchmarks.results import Row, ScoreTable, score_rows
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.shards import Shard
from tokensel.benchmarks.table import Benchmark
from tokensel.cost.answers import Work
from tokensel.cost.layers import mean_tokens
from tokensel.utils.errors import TokenselError

__all__ = ["RecordedAnswers", "difficult", "difficult_rows", "joined", "recorded_answers"]


@dataclass(frozen=True)
class RecordedAnswers:
    """What one benchmark's questions were answered, and what the answers took.

    Attributes:
        benchmark: the benchmark.
        table: its scores, one a question for each condition, in the order in which they are averaged.
        work: for each condition what every row of the benchmark took.
    """

    benchmark: Benchmark
    table: ScoreTable
    work: dict[Condition, list[Work]]

    def mean_tokens(self, condition: Condition) -> float:
        """Visual tokens that a layer reads of a prompt, newlines included: mean over layers and questions."""
        return float(np.mean([mean_tokens(answer) for answer in self.work[condition]]))

    def ranking_rows(self, condition: Condition) -> float:
        """Rows of attention that an answer computes to rank tokens, averaged over the questions."""
        return float(np.mean([len(answer["ranked"]) for answer in self.work[condition]]))


def recorded_answers(config: EvalConfig) -> list[RecordedAnswers]:
    """The answers of a finished evaluation, by benchmark; nothing is generated.

    Args:
        config: that of the evaluation.

    Raises:
        TokenselError: an answer is missing, or the records belong to other questions.
    """
    session = EvalSession(config)
    found = []
    for benchmark in config.suite_benchmarks().values():
        questions = load_questions(benchmark, config.split, config.n)
        files = load_records(session, questions, Path(config.out) / "records", Shard.of("1/1"))
        if missing := count_missing(questions, files):
            raise TokenselError(
                f"{benchmark.name}: {missing} answers are missing in {config.out}: run the evaluation first"
            )
        scores = question_scores(questions, files)
        found.append(
            RecordedAnswers(
                benchmark,
                ScoreTable.of(benchmark, scores, questions.clusters, questions.categories),
                {c: [file.work[name] for name in questions.ids] for c, file in files.items()},
            )
        )
    return found


def joined(runs: Sequence[Sequence[RecordedAnswers]]) -> list[RecordedAnswers]:
    """Answers of several evaluations of the same questions as if they were one evaluation.

    Methods that are compared at equal cost have labels of their own, so that each needs an evaluation of its
    own. A condition that occurs in several evaluations is taken from the last of them.

    Raises:
        TokenselError: no evaluations, or of other benchmarks or other numbers of questions.
    """

    def asked(run: Sequence[RecordedAnswers]) -> list[tuple[str, int]]:
        return [(part.benchmark.name, len(part.table.categories)) for part in run]

    if not runs or any(asked(run) != asked(runs[0]) for run in runs):
        raise TokenselError("these evaluations asked other questions: join those with the same suite and n")
    together = []
    for parts in zip(*runs):
        scores = {c: column for part in parts for c, column in part.table.scores.items()}
        work = {c: answers for part in parts for c, answers in part.work.items()}
        together.append(RecordedAnswers(parts[0].benchmark, replace(parts[0].table, scores=scores), work))
    return together


def difficult(
    full: Float[np.ndarray, "questions"], small: Float[np.ndarray, "questions"], right: float = 0.5
) -> Bool[np.ndarray, "questions"]:
    """The questions that all tokens answer and as many tokens of a smaller image do not.

    This is the split of VTC-Bench (Liao et al. 2025, arXiv 2510.07143): what the whole image does not answer
    says nothing about dropping tokens, and what a small image answers does not need a choice of tokens.

    Args:
        full: scores with all tokens, 0 to 1.
        small: scores of the down-sampled image, in the same order.
        right: the least score that counts as a right answer; the metrics for reading give parts of a point.
    """
    return (full >= right) & (small < right)


def difficult_rows(
    model: str, answers: Sequence[RecordedAnswers], small: Condition, *, right: float = 0.5, seed: int = 0
) -> list[Row]:
    """Rows of the long table for the difficult questions alone, see :func:`difficult`.

    Args:
        model: its name in the table.
        answers: of an evaluation with ``full`` and the condition ``small``.
        small: the condition, of the method ``downsample``, that tells which questions are difficult. Its own
            row is nearly 0 by construction, and that of ``full`` nearly 1: they are left out.
        right: see :func:`difficult`.
        seed: seed of the bootstrap.

    Returns:
        Rows of the benchmarks that have difficult questions; ``n`` says how many.

    Raises:
        TokenselError: one of the two conditions was not evaluated.
    """
    rows = []
    for part in answers:
        scores = part.table.scores
        whole = next((condition for condition in scores if condition.method == "full"), None)
        if whole is None or small not in scores:
            name = "full" if whole is None else f"{small.method} at keep {small.keep:g}"
            raise TokenselError(f"{part.benchmark.name} was not answered under {name}: evaluate it too")
        chosen = difficult(scores[whole], scores[small], right)
        if chosen.any():
            rest = {c: column[chosen] for c, column in scores.items() if c not in (whole, small)}
            strata = None if part.table.strata is None else part.table.strata[chosen]
            rows += score_rows(model, part.benchmark, rest, seed=seed, strata=strata)
    return rows
