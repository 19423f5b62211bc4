"""The field on the small world: every method, recorded in one run, with the controls that critics ask for.

Five tables beside each other. ``field.csv``: scores, counted cost and the measured time to the first token.
``field.standing.csv``: the selector minus every method at as many tokens, question by question.
``field.difficult.csv``: the scores on what a smaller image does not answer. ``field.words.csv``: words and
nonsense on the same pages. ``field.turns.csv``: a second question on the cache of the first.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.describe import all_methods
from tokensel.benchmarks.followups import TURN_COLUMNS, follow_up_rows, question_pairs
from tokensel.benchmarks.questions import load_questions
from tokensel.benchmarks.recorded import RecordedAnswers, difficult_rows, recorded_answers
from tokensel.benchmarks.results import Row
from tokensel.benchmarks.runner import evaluate
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.shards import Shard
from tokensel.benchmarks.statistics import bootstrap
from tokensel.book.mini.controls import TWICE
from tokensel.book.mini.oracle import register_oracles
from tokensel.methods import check_method, prepare
from tokensel.profiling.workload import Processed
from tokensel.utils.files import write_json, write_text
from tokensel.utils.provenance import json_digest
from tokensel.utils.source import code_digest

__all__ = [
    "KEEPS", "difficult_table", "field_config", "first_token_times", "record_field", "standing_table"
]  # fmt: skip

KEEPS = (0.1, 0.2, 0.3, 0.5)
SEEDS = (0, 1, 2)
SUITE, CONTROLS = "tokensel.book.mini.suite", "tokensel.book.mini.controls"
SPELLED = ("words", "nonsense")
DRAWN = ("oracle", "drawn")  # they draw the page again, whose time says nothing
DIFFERENCE = ("difference", "difference_low", "difference_high")
TIMES = ("first_token_ms", "full_first_token_ms", "first_token_speedup")
ASKED_TWICE = 0.3  # the one budget of the conversations, which take several times as long as an answer
PAGES = 100  # that are asked twice, or as many as there are questions
_ROUNDS = 11  # of the times; medians


def field_config(out: Path, n: int, trained: dict[str, str | None], **more: Any) -> EvalConfig:
    """The evaluation of all methods that can be run.

    Args:
        out: folder of the records.
        n: questions of each benchmark.
        trained: folders of trained parts by the option of the evaluation; a method whose part has none is
            left out.
        more: further fields of the configuration, ``methods`` among them.
    """
    register_oracles()
    parts = {name: folder for name, folder in trained.items() if folder is not None}
    chosen = []
    for name in more.pop("methods", ()) or all_methods():
        row = check_method(name)
        needed = "dyrate" if row.uses_predictor else row.learned
        if not row.uses_native and (needed is None or needed in parts):
            chosen.append(name)
    values: dict[str, Any] = {"suite": SUITE, "model": "data/mini/llava-next", "keeps": KEEPS, "seeds": SEEDS}
    values |= {"methods": tuple(chosen), "n": n, "compare": (), "thumbnail": "last", "name": "field"}
    return EvalConfig.from_dict(values | {"out": str(out)} | parts | more)


def record_field(config: EvalConfig, table: Path) -> Path | None:
    """Record the five tables; after a kill, the same call resumes.

    Args:
        config: from :func:`field_config`; with ``shard`` several processes share the answers, and the last
            one writes the tables.
        table: where the first table goes; the others and the provenance are written beside it.

    Returns:
        The table, or ``None`` if other shards have answers left to give.
    """
    done = evaluate(config)
    spelled = replace(config, suite=CONTROLS, benchmarks=SPELLED, name="words")
    words = evaluate(spelled)
    turns = _turns(config)
    if done.table is None or words.table is None or done.provenance is None or turns is None:
        return None
    session = EvalSession(config)
    times = pd.DataFrame(_kept_times(session, Path(config.out) / "times"))
    rows = pd.read_csv(done.table).merge(times, on=["method", "keep", "seed"], how="left")
    _write(table, rows)
    answers = recorded_answers(config)
    _write(table.with_suffix(".standing.csv"), standing_table(answers))
    _write(table.with_suffix(".difficult.csv"), difficult_table(session.name, answers, config.seed))
    _write(table.with_suffix(".words.csv"), pd.read_csv(words.table))
    _write(table.with_suffix(".turns.csv"), pd.DataFrame(turns, columns=list(TURN_COLUMNS)))
    write_json(table.with_suffix(".provenance.json"), json.loads(done.provenance.read_text(encoding="utf-8")))
    return table


def _write(path: Path, rows: pd.DataFrame) -> None:
    write_text(path, rows.to_csv(index=False, float_format="%.6g"))


def standing_table(answers: Sequence[RecordedAnswers], own: str = "selector", seed: int = 0) -> pd.DataFrame:
    """One method minus every other where a layer reads nearly as many visual tokens, on the same questions.

    Args:
        answers: of an evaluation.
        own: the method that is compared.
        seed: seed of the bootstrap.

    Returns:
        A row for each benchmark, budget of the method and other method: ``keep``, the budget; ``label``, that
        of the other under which its layers read on average, over all benchmarks, as many tokens as they can;
        ``tokens``, theirs over those of ``own``; and ``difference`` with its 95 % interval, in 0 to 1. A
        method of several seeds stands with the first. Empty without ``own``.
    """
    conditions = {(c.method, c.keep): c for c in reversed(answers[0].table.scores)}  # the first seed stays
    read = {key: np.mean([part.mean_tokens(c) for part in answers]) for key, c in conditions.items()}
    rivals = dict.fromkeys(method for method, _ in conditions if method != own)
    rows: list[Row] = []
    for keep in [keep for method, keep in conditions if method == own]:
        near = {}  # of each rival the label that comes nearest
        for rival in rivals:
            labels = [label for method, label in conditions if method == rival]
            near[rival] = min(labels, key=lambda label: abs(read[rival, label] - read[own, keep]))
        for part in answers:
            scores, name, group = part.table.scores, part.benchmark.name, part.benchmark.group
            base = scores[conditions[own, keep]]
            gaps = np.stack([base - scores[conditions[rival]] for rival in near.items()], 1)
            for (rival, label), *values in zip(near.items(), *bootstrap(gaps, seed=seed), strict=True):
                row = {"benchmark": name, "group": group, "method": rival, "keep": keep, "label": label}
                row |= {"tokens": read[rival, label] / read[own, keep], "n": len(base)}
                rows.append(row | dict(zip(DIFFERENCE, map(float, values), strict=True)))
    return pd.DataFrame(rows)


def difficult_table(model: str, answers: Sequence[RecordedAnswers], seed: int = 0) -> pd.DataFrame:
    """Scores on the questions that down-sampling to a budget gets wrong, for each budget.

    Args:
        model: its name in the table.
        answers: with those of ``full`` and of ``downsample``.
        seed: seed of the bootstrap.

    Returns:
        The columns of the long table without costs, and ``small``: the budget of the smaller image. Methods
        have the same budget, or none.
    """
    parts: list[Row] = []
    for small in [c for c in answers[0].table.scores if c.method == "downsample"]:
        same = [_at_keep(part, small.keep) for part in answers]
        rows = difficult_rows(model, same, small, seed=seed)
        parts += [row | {"small": small.keep} for row in rows]
    return pd.DataFrame(parts)


def _at_keep(part: RecordedAnswers, keep: float) -> RecordedAnswers:
    """The answers under one budget, and of the methods without a choice of one."""
    scores = {
        condition: column
        for condition, column in part.table.scores.items()
        if condition.keep == keep or not check_method(condition.method).uses_keep
    }
    return replace(part, table=replace(part.table, scores=scores))


def _kept_times(session: EvalSession, folder: Path) -> list[Row]:
    """:func:`first_token_times`, measured once for the same code, model and methods."""
    conditions = session.config.conditions()
    identity = [session.identity(condition) | {"rounds": str(_ROUNDS)} for condition in conditions]
    path = folder / f"{json_digest([identity, [vars(c) for c in conditions]])}.json"
    if not path.is_file():
        write_json(path, first_token_times(session, _ROUNDS))
    return json.loads(path.read_text(encoding="utf-8"))


def first_token_times(session: EvalSession, rounds: int) -> list[Row]:
    """How long the first token of a form takes under every condition, beside the full model.

    One question at a time, from processed pixels to the token on the host, the tower's and the scorer's work
    included. Every round runs each condition once, and all tokens right before it, in an order that turns
    from round to round; the first round is a warm-up.

    Returns:
        Method, keep and seed with :data:`TIMES`: medians in milliseconds, and the median of the ratios.
        Nothing for scorers that draw the page again.
    """
    questions = load_questions(session.config.suite_benchmarks()["forms"], session.config.split, 1)
    vlm = session.vlm
    inputs = dict(vlm.inputs([questions.image(0)], [vlm.prompt(questions.prompts[0])]))
    conditions = [c for c in session.config.conditions() if check_method(c.method).scorer not in DRAWN]
    full, took = Condition("full", 1.0, session.config.seed), {c: [] for c in conditions}
    for number in range(rounds + 1):
        turn = number % len(conditions)
        for condition in conditions[turn:] + conditions[:turn]:
            pair = [_first_token(session, inputs, one) for one in (full, condition)]
            if number:
                took[condition].append(pair)
    rows = []
    for condition, pairs in took.items():
        whole, own = 1000 * np.array(pairs).T
        values = (np.median(own), np.median(whole), np.median(whole / own))
        rows.append(vars(condition) | dict(zip(TIMES, map(float, values), strict=True)))
    return rows


@torch.inference_mode()
def _first_token(session: EvalSession, inputs: dict[str, torch.Tensor], condition: Condition) -> float:
    """Seconds until the first token; the tower runs, too."""
    keep = condition.keep if check_method(condition.method).uses_keep else 1.0
    schedule, scorer = session.schedule(condition), session.scorer(condition)
    start = time.perf_counter()
    batch = Processed(session.vlm.model, inputs)
    reduced = prepare(batch, condition.method, keep, session.config.choices(), scorer)
    session.vlm.generate_output(reduced, 1, schedule).tokens.tolist()  # waits for the device
    return time.perf_counter() - start


def _turns(config: EvalConfig) -> list[Row] | None:
    """Rows of two questions on one cache, a file for each condition, so that a kill loses one at most.

    ``None`` if other shards have conditions left.
    """
    asked_twice = tuple(f"{task}_twice" for task in TWICE)
    keeps = (ASKED_TWICE,) if ASKED_TWICE in config.keeps else config.keeps
    asked = replace(config, suite=CONTROLS, benchmarks=asked_twice, name="turns", seeds=(), keeps=keeps)
    session, folder, shard = EvalSession(asked), Path(config.out) / "turns", Shard.of(config.shard)
    assert config.n is not None, "the command line gives a number"
    code, pages = code_digest("tokensel.benchmarks.followups"), min(config.n, PAGES)
    paths: list[Path] = []
    for benchmark in asked.suite_benchmarks().values():
        missing = {}
        for number, condition in enumerate(asked.conditions()):
            identity = [session.identity(condition), vars(condition), benchmark.name, pages, code]
            paths.append(folder / f"{json_digest(identity)}.json")
            if shard.holds(number) and not paths[-1].is_file():
                missing[condition] = paths[-1]
        if missing:
            questions = load_questions(benchmark, asked.split, 2 * pages)
            found = follow_up_rows(session, questions, question_pairs(questions), list(missing))
            for path, rows in zip(missing.values(), found, strict=True):
                write_json(path, rows)
    if not all(path.is_file() for path in paths):
        return None
    return [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))]
