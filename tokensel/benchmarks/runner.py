"""Answer every question under every condition, keep each answer at once, and write the tables at the end."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tokensel.benchmarks.answering import answer_missing
from tokensel.benchmarks.conditions import Condition, check_pairs, parse_pairs
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import Questions, load_questions
from tokensel.benchmarks.record_files import RecordFile, count_missing, load_records, question_scores
from tokensel.benchmarks.records import sole_writer
from tokensel.benchmarks.results import (
    CATEGORIES,
    DIFFERENCES,
    ScoreTable,
    category_rows,
    difference_rows,
    score_rows,
    write_table,
)
from tokensel.benchmarks.served import ServedSession, ask_servers
from tokensel.benchmarks.session import EvalSession, Session
from tokensel.benchmarks.shards import Shard, is_first_here
from tokensel.utils.files import write_json
from tokensel.utils.progress import progress_bar
from tokensel.utils.provenance import command_line

__all__ = ["Evaluation", "evaluate"]

Files = Sequence[dict[Condition, RecordFile]]  # by benchmark, then by condition


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation left on the disk.

    Attributes:
        table: the long table, one row for each benchmark, method, keep and seed.
        differences: paired differences between methods.
        categories: the long table by category, for benchmarks that have categories.
        provenance: what was run, on what, when, for how long.
        computed: answers generated now; the others existed already.
        left: answers that other shards have yet to generate; the tables are ``None`` until there are none
            left.
    """

    table: Path | None
    differences: Path | None
    categories: Path | None
    provenance: Path | None
    computed: int
    left: int = 0


def evaluate(config: EvalConfig, progress: bool = True) -> Evaluation:
    """Run an evaluation to its end, from wherever an earlier run stopped.

    Every answer is one JSON line below ``<out>/records``, on the disk before the next batch begins. A later
    run with the same model, selector, choices and code takes the answers that exist and generates the rest;
    with others it keeps separate records. Scores depend neither on batch size nor on order, nor on the number
    of interruptions, processes and machines: each shard writes files of its own, all shards read all files,
    and the last shard to finish writes the tables. Where two evaluations want answers of the same model to
    the same benchmark in the same ``out``, one waits for the other and takes what it computed.

    Args:
        config: what to run.
        progress: show a bar on stderr.

    Returns:
        Where the tables are.

    Raises:
        TokenselError: the model, the selector or the data does not fit, nothing can be written, or servers
            left questions without an answer; the message says which.
    """
    started = time.perf_counter()
    shard = Shard.of(config.shard)
    benchmarks = config.suite_benchmarks()
    session, answer = _open(config)
    config = session.config  # with the keeps of this model
    if config.compare != EvalConfig.compare:  # the default compares methods that need not be run
        check_pairs(config.compare, config.conditions())
    session.check_fit()
    questions = [load_questions(benchmark, config.split, config.n) for benchmark in benchmarks.values()]
    records = Path(config.out) / "records"
    files = [load_records(session, part, records, shard) for part in questions]
    total = sum(len(part) * len(part_files) for part, part_files in zip(questions, files))
    missing, computed = sum(map(count_missing, questions, files)), 0
    share = -(-missing // shard.count)  # of this shard, about
    shown = progress and is_first_here()
    with progress_bar(total - missing + share, done=total - missing, unit="answers", shown=shown) as bar:
        for i, part in enumerate(questions):
            if before := count_missing(part, files[i]):
                name = part.benchmark.name
                lock = records / name / f".lock-{session.model_digest}"
                note = partial(bar.set_description, f"{name}: waiting for another evaluation to finish")
                with sole_writer(lock, shard, waiting=note):
                    # another process may have written answers since the first look
                    files[i] = load_records(session, part, records, shard, locked=True)
                    if shard.count == 1:
                        bar.update(before - count_missing(part, files[i]))
                    computed += answer(part, files[i], shard, bar)
    session.check_answered()
    if shard.count > 1:
        files = [load_records(session, part, records, shard) for part in questions]
        if left := sum(map(count_missing, questions, files)):
            return Evaluation(None, None, None, None, computed, left)
    all_files = [file for part_files in files for file in part_files.values()]
    provenance = _provenance(session, questions)
    provenance |= {
        "answers": total,
        "answers_computed_now": computed,
        "wall_seconds_now": round(time.perf_counter() - started, 1),
        "generation_seconds_in_all": round(sum(file.seconds for file in all_files), 1),
        "answers_by_versions": dict(sum((file.versions for file in all_files), Counter())),
    }
    return _write_tables(session, questions, files, provenance, computed)


def _open(config: EvalConfig) -> tuple[Session, Callable[..., int]]:
    """The model in this process or behind servers, and the function that asks it what is missing."""
    if config.server:
        served = ServedSession(config)
        return served, partial(ask_servers, served)
    session = EvalSession(config)
    return session, partial(answer_missing, session)


def _provenance(session: Session, questions: list[Questions]) -> dict[str, Any]:
    """What was run, on what, and when."""
    config = session.config
    return {
        **session.provenance(),
        "data": {part.benchmark.name: len(part) for part in questions}
        | {"suite": config.suite, "split": config.split},
        "sources": {part.benchmark.name: part.source for part in questions if part.source},
        "seed": config.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": config.to_dict(),
    }


def _write_tables(
    session: Session,
    questions: list[Questions],
    files: Files,
    provenance: dict[str, Any],
    computed: int,
) -> Evaluation:
    """Score all answers and write the tables of a finished evaluation."""
    config, model = session.config, session.name
    pairs, seed, stem = parse_pairs(config.compare), config.seed, Path(config.out) / config.name
    rows, differences, categories = [], [], []
    for part, part_files in zip(questions, files):
        benchmark = part.benchmark
        scores = question_scores(part, part_files)
        means = {
            condition: session.mean_cost(condition, [file.work[name] for name in part.ids])
            for condition, file in part_files.items()
        }
        costs = {condition: mean for condition, mean in means.items() if mean is not None}
        table = ScoreTable.of(benchmark, scores, part.clusters, part.categories)
        rows += score_rows(model, benchmark, table.scores, costs, seed=seed, strata=table.strata)
        differences += difference_rows(model, benchmark, table.scores, pairs, seed=seed, strata=table.strata)
        categories += category_rows(model, benchmark, table, seed=seed)
    if not categories:  # those of an earlier evaluation would not belong to the new tables
        Path(f"{stem}.categories.csv").unlink(missing_ok=True)
    return Evaluation(
        table=write_table(f"{stem}.csv", rows),
        differences=write_table(f"{stem}.differences.csv", differences, DIFFERENCES),
        categories=write_table(f"{stem}.categories.csv", categories, CATEGORIES) if categories else None,
        provenance=write_json(f"{stem}.provenance.json", provenance),
        computed=computed,
    )
