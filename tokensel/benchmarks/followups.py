"""Two questions about one image, one after the other: does a method keep what the second one asks for?

A method that sees the question may do well on it and leave the next question nothing to read. So two
questions about each image are asked on one cache, and both answers are scored. The full model shows what the
longer conversation costs by itself.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.questions import Questions, image_digest, stable_keys
from tokensel.benchmarks.results import Row
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.statistics import bootstrap
from tokensel.methods import Batch, check_method, prepare
from tokensel.vlm.followup import follow_up

__all__ = ["TURNS", "TURN_COLUMNS", "follow_up_rows", "question_pairs"]

TURNS = ("first", "second", "second - first")
_NAMES = ("model", "benchmark", "group", "method", "keep", "metric", "turn")
TURN_COLUMNS = (*_NAMES, "score", "ci_low", "ci_high", "n", "seed")
"""Columns of the table: those of the long table, with ``turn``, one of ``TURNS``."""


def question_pairs(questions: Questions) -> list[tuple[int, int]]:
    """Pairs of neighbouring questions about the same image, no question in two of them.

    Args:
        questions: of a benchmark in which the questions about an image stand side by side.
    """
    digests = [image_digest(questions.image(i)) for i in range(len(questions))]
    pairs, i = [], 0
    while i + 1 < len(digests):
        same = digests[i] is not None and digests[i] == digests[i + 1]
        pairs += [(i, i + 1)] if same else []
        i += 2 if same else 1
    return pairs


def follow_up_rows(
    session: EvalSession,
    questions: Questions,
    pairs: Sequence[tuple[int, int]],
    conditions: Sequence[Condition] | None = None,
) -> Iterator[list[Row]]:
    """Ask every pair under every condition of an evaluation, one condition after the other.

    Args:
        session: the model with its configuration; the questions and their number are not taken from it.
        questions: those of one benchmark.
        pairs: from :func:`question_pairs`.
        conditions: some of the evaluation's; all by default.

    Yields:
        Three rows of the table, see :data:`TURN_COLUMNS`: the score of the first answers, that of the second
        ones, and the paired difference. Nothing if there are no pairs.
    """
    if not pairs:
        return
    size = session.config.batch_size
    batches = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        firsts = [one for one, _ in part]
        keys = stable_keys([questions.ids[i] for i in firsts])
        images, prompts = [questions.image(i) for i in firsts], [questions.prompts[i] for i in firsts]
        batches.append((part, Batch(session.vlm, images, prompts, keys)))
    for condition in session.config.conditions() if conditions is None else conditions:
        scores = np.concatenate(
            [_scores(session, questions, condition, part, batch) for part, batch in batches]
        )
        columns = np.column_stack([scores, scores[:, 1] - scores[:, 0]])
        means, lows, highs = bootstrap(columns, seed=session.config.seed)
        yield [
            {
                "model": session.name,
                "benchmark": questions.benchmark.name,
                "group": questions.benchmark.group,
                "method": condition.method,
                "keep": condition.keep,
                "metric": questions.benchmark.metric,
                "turn": turn,
                "score": float(mean),
                "ci_low": float(low),
                "ci_high": float(high),
                "n": len(pairs),
                "seed": condition.seed,
            }
            for turn, mean, low, high in zip(TURNS, means, lows, highs, strict=True)
        ]


def _scores(
    session: EvalSession,
    questions: Questions,
    condition: Condition,
    pairs: Sequence[tuple[int, int]],
    batch: Batch,
) -> np.ndarray:
    """Scores of both answers, ``[pairs, 2]``."""
    keep = condition.keep if check_method(condition.method).uses_keep else 1.0
    reduced = prepare(batch, condition.method, keep, session.config.choices(), session.scorer(condition))
    answers = follow_up(
        session.vlm,
        reduced,
        [questions.prompts[second] for _, second in pairs],
        questions.benchmark.max_new_tokens,
        session.schedule(condition),
    )
    return np.array(
        [
            (questions.score(one, first), questions.score(two, second))
            for (one, two), first, second in zip(pairs, answers.first, answers.second, strict=True)
        ]
    )
