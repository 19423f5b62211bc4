"""Record how often answers are right, by the evidence of the question and what is kept of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import load_questions, stable_keys
from tokensel.benchmarks.recorded import RecordedAnswers, recorded_answers
from tokensel.benchmarks.results import Row, score_rows
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini.evidence import evidence, kept_evidence
from tokensel.book.mini.suite import asked_page
from tokensel.methods import Batch, check_method
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import json_digest
from tokensel.utils.source import code_digest
from tokensel.vlm import Choices
from tokensel.vlm.visual import choose_tokens

__all__ = ["EDGES", "evidence_config", "evidence_rows", "record_evidence"]

LARGE, SUITE = "tokensel.book.mini.large_suite", "tokensel.book.mini.suite"
# of the suite: those that read a word, and one about small things
OLD = ("forms", "charts", "posters", "scene_text", "attributes")
SHARES = ("kept", "kept_cue", "kept_letters")  # as kept_evidence has them
EDGES = (0, 4, 8, 16, 32, 64, 256)  # tokens of evidence: a row above each and up to the next


def evidence_config(
    out: Path, model: Path, selector: Path, n: int, split: str = "test", **more: Any
) -> EvalConfig:
    """The evaluation of the large tasks; ``more`` are further fields of it, methods and keeps among them."""
    values = {"suite": LARGE, "model": str(model), "selector": str(selector), "n": n, "split": split}
    values |= {"thumbnail": "last", "compare": ()}
    return EvalConfig.from_dict(values | {"name": "evidence", "out": str(out)} | more)


def record_evidence(
    config: EvalConfig, table: Path, old: Sequence[str] = OLD, progress: bool = True
) -> Path | None:
    """Record :func:`evidence_rows` of all tasks, with the provenance beside it; after a kill, it resumes.

    Args:
        config: from :func:`evidence_config`; with ``shard`` several processes share the answers, and the last
            one writes the table.
        table: where the table goes.
        old: tasks of the suite that are asked, too.
        progress: whether to show bars.

    Returns:
        The table, or ``None`` if other shards have answers left to give.
    """
    asked = [config]
    if old:
        asked.append(replace(config, suite=SUITE, benchmarks=tuple(old), name=f"{config.name}_suite"))
    done = [evaluate(part, progress=progress) for part in asked]
    last = done[-1].provenance
    if last is None or any(part.table is None for part in done):
        return None
    rows: list[Row] = []
    for part in asked:
        session = EvalSession(part)
        for answers in recorded_answers(part):
            rows += evidence_rows(session, answers, _kept_shares(session, answers))
    write_text(table, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    facts = json.loads(last.read_text(encoding="utf-8"))
    facts["data"] |= {"suite": [part.suite for part in asked], "edges": EDGES}
    write_json(table.with_suffix(".provenance.json"), facts)
    return table


def evidence_rows(
    session: EvalSession, answers: RecordedAnswers, kept: dict[Condition, list[list[float]]]
) -> list[Row]:
    """Rows of one benchmark: one for all questions, and one for each class of evidence, by condition.

    Besides the columns of an evaluation: ``most``, the largest number of tokens of evidence in the row (0:
    all questions); ``tokens``, ``share`` of the page, ``cue`` and ``letters``, means; ``kept``, ``kept_cue``
    and ``kept_letters``, the mean shares of them that are kept at full resolution; ``cost``, ``cost_low`` and
    ``cost_high``: what all tokens score more on the same questions, with its 95 % interval.
    """
    task, split = answers.benchmark.name, session.config.split
    count = len(answers.table.categories)
    seen = [evidence(task, *asked_page(task, split, index)) for index in range(count)]
    every = pd.DataFrame([asdict(one) for one in seen])
    tokens = every["tokens"].to_numpy()
    parts = [(0, np.ones(count, bool))]
    parts += [(high, (tokens > low) & (tokens <= high)) for low, high in pairwise(EDGES)]
    rows: list[Row] = []
    for most, where in parts:
        if not where.any():
            continue
        facts = {"most": most} | every[where].mean().to_dict()
        scores = {condition: column[where] for condition, column in answers.table.scores.items()}
        made = score_rows(session.name, answers.benchmark, scores, seed=session.config.seed)
        columns = np.stack(list(scores.values()), axis=1)
        full = next(place for place, condition in enumerate(scores) if condition.method == "full")
        costs = np.stack(bootstrap(columns[:, [full]] - columns, seed=session.config.seed), axis=1)
        for row, condition, cost in zip(made, scores, costs, strict=True):
            given = float(condition.method != "none")
            shares = np.array(kept[condition])[where].mean(0) if condition in kept else [given] * 3
            row |= facts | dict(zip(SHARES, map(float, shares)))
            rows.append(row | dict(zip(("cost", "cost_low", "cost_high"), map(float, cost))))
    return rows


def _kept_shares(session: EvalSession, answers: RecordedAnswers) -> dict[Condition, list[list[float]]]:
    """For each condition with a budget, :func:`kept_evidence` of every question; a file each."""
    task, config = answers.benchmark.name, session.config
    conditions = [c for c in answers.table.scores if check_method(c.method).uses_keep]
    count = len(answers.table.categories)
    code = code_digest("tokensel.book.mini.evidence")
    identity = [session.identity(c) | {"keep": f"{c.keep:g}", "seed": f"{c.seed}"} for c in conditions]
    path = Path(config.out) / "kept" / f"{json_digest([identity, task, config.split, count, code])}.json"
    if not path.is_file():
        write_json(path, _measured_shares(session, answers, conditions, count))
    columns = json.loads(path.read_text(encoding="utf-8"))
    return dict(zip(conditions, columns, strict=True))


def _measured_shares(
    session: EvalSession, answers: RecordedAnswers, conditions: list[Condition], count: int
) -> list[list[list[float]]]:
    """For each condition :func:`kept_evidence` of every question; nothing is generated."""
    config, task = session.config, answers.benchmark.name
    choices = Choices.of(config.choices())
    questions = load_questions(answers.benchmark, config.split, config.n)
    shares: list[list[list[float]]] = [[] for _ in conditions]
    for start in range(0, count, config.batch_size):
        rows = range(start, min(count, start + config.batch_size))
        keys = stable_keys([questions.ids[i] for i in rows])
        images = [questions.image(i) for i in rows]
        encoded = Batch(session.vlm, images, [questions.prompts[i] for i in rows], keys).seeing
        asked = [asked_page(task, config.split, i) for i in rows]
        for column, condition in zip(shares, conditions):
            scorer = session.scorer(condition)
            cells, _ = choose_tokens(encoded, scorer, condition.keep, choices)
            column += kept_evidence(encoded, cells, task, asked).tolist()
    return shares
