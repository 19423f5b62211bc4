"""Ask every question in every way, keep each answer at once, merge them into tables in the end."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from tokensel.benchmarks.asker import Asker
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.identity import command_line, environment
from tokensel.benchmarks.progress import progress_bar
from tokensel.benchmarks.questions import Questions, image_digest, load_questions, stable_keys
from tokensel.benchmarks.records import Record, append_records, digest, read_records, sole_writer
from tokensel.benchmarks.results import (
    DIFFERENCES,
    Condition,
    Scores,
    difference_rows,
    parse_pairs,
    score_rows,
    write_table,
)
from tokensel.cost import answer_costs
from tokensel.errors import TokenselError
from tokensel.io import write_json
from tokensel.methods import Batch, check_method, prepare

_WINDOW = 8  # batches of which the questions are sorted by length; bounds how many pictures are in memory
_SPOT_CHECKS = 16  # pictures of recorded questions that are compared before the records are continued


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation left on the disk.

    Attributes:
        table: the long table, one row a benchmark, method, keep and seed.
        differences: paired differences between methods.
        provenance: what was run, on what, when, for how long.
        computed: answers generated now; the others were there already.
    """

    table: Path
    differences: Path
    provenance: Path
    computed: int


@dataclass
class _Shelf:
    """The records of one benchmark under one condition."""

    path: Path
    records: dict[str, Record]


def evaluate(config: EvalConfig, progress: bool = True) -> Evaluation:
    """Run an evaluation to its end, from wherever an earlier run was stopped.

    Every answer is one JSON line below ``<out>/records``, on the disk before the next batch is asked. A later
    run with the same model, selector, choices and code takes what is there and asks the rest; with others it
    keeps records of its own. Scores depend on neither batch size nor order nor the number of interruptions.

    Args:
        config: what to run.
        progress: show a bar on stderr.

    Returns:
        Where the tables are.

    Raises:
        TokenselError: the model, the selector, the data or the disk is not as it must be, see the line.
    """
    started = time.perf_counter()
    benchmarks = config.suite_benchmarks()
    asker = Asker(config)
    asker.check_fit()
    questions = [load_questions(benchmark, config.split, config.n) for benchmark in benchmarks.values()]
    folder = Path(config.out)
    with sole_writer(folder / "records"):
        shelves = [_open_shelves(asker, each, folder / "records") for each in questions]
        total = sum(len(each) * len(mine) for each, mine in zip(questions, shelves))
        missing = sum(
            len(_missing(each, shelf)) for each, mine in zip(questions, shelves) for shelf in mine.values()
        )
        with progress_bar(total, done=total - missing, unit="answers", shown=progress) as bar:
            for each, mine in zip(questions, shelves):
                _ask(asker, each, mine, bar)
    scores, flops, kv_bytes = (
        [_column(name, each, mine) for each, mine in zip(questions, shelves)]
        for name in ("score", "flops", "kv_bytes")
    )
    pairs = parse_pairs(config.compare)
    tables = list(zip(benchmarks.values(), scores))
    rows = [
        row
        for each, *costs in zip(tables, flops, kv_bytes)
        for row in score_rows(asker.name, *each, *costs, seed=config.seed)
    ]
    differences = [
        row for each in tables for row in difference_rows(asker.name, *each, pairs, seed=config.seed)
    ]
    table = write_table(folder / f"{config.name}.csv", rows)
    found = [record for mine in shelves for shelf in mine.values() for record in shelf.records.values()]
    provenance = {
        "model": {"name": config.model, "digest": asker.model_digest, "dtype": str(asker.vlm.model.dtype)},
        "data": {each.benchmark.name: len(each) for each in questions}
        | {"suite": config.suite, "split": config.split},
        **environment(asker.vlm.model.device),
        "seed": config.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": config.to_dict(),
        "answers": total,
        "answers_computed_now": missing,
        "wall_seconds_now": round(time.perf_counter() - started, 1),
        "generation_seconds_in_all": round(sum(record["seconds"] for record in found), 1),
    }
    return Evaluation(
        table=table,
        differences=write_table(folder / f"{config.name}.differences.csv", differences, DIFFERENCES),
        provenance=write_json(folder / f"{config.name}.provenance.json", provenance),
        computed=missing,
    )


def _open_shelves(asker: Asker, questions: Questions, folder: Path) -> dict[Condition, _Shelf]:
    """The records there are for each condition, made sure to belong to these questions."""
    benchmark, shelves = questions.benchmark, {}
    for condition in asker.config.conditions():
        task = {"metric": benchmark.metric, "max_new_tokens": benchmark.max_new_tokens}
        made = digest(asker.identity(condition) | task)
        file = f"keep-{condition.keep:g}_seed-{condition.seed}_{made}.jsonl"
        path = folder / benchmark.name / condition.method / file
        shelves[condition] = _Shelf(path, read_records(path))
    recorded = {}
    for i, name in enumerate(questions.ids):
        for shelf in shelves.values():
            if record := shelf.records.get(name):
                questions.check_record(i, record)
                recorded[i] = record
    for i in list(recorded)[:: max(1, len(recorded) // _SPOT_CHECKS)]:
        questions.check_record(i, recorded[i], questions.image(i))
    return shelves


def _missing(questions: Questions, shelf: _Shelf) -> list[int]:
    return [i for i, name in enumerate(questions.ids) if name not in shelf.records]


def _ask(asker: Asker, questions: Questions, shelves: dict[Condition, _Shelf], bar: tqdm) -> None:
    """Fill the shelves: one batch at a time, all its conditions on one run of the vision tower."""
    missing = {condition: set(_missing(questions, shelf)) for condition, shelf in shelves.items()}
    wanted = set().union(*missing.values())
    for indices, batch, digests in _batches(asker, questions, wanted):
        for condition, shelf in shelves.items():
            if not missing[condition].isdisjoint(indices):
                bar.set_description(
                    f"{questions.benchmark.name}, {condition.method} {condition.keep:g}", refresh=False
                )
                records = _answer(asker, questions, condition, indices, batch, digests)
                # after a kill in the middle of a write a batch may be there in part: what is there stays
                new = [record for i, record in zip(indices, records) if i in missing[condition]]
                append_records(shelf.path, new)
                shelf.records |= {record["question_id"]: record for record in new}
                bar.update(len(new))


def _batches(
    asker: Asker, questions: Questions, wanted: set[int]
) -> Iterator[tuple[list[int], Batch, list[str]]]:
    """Batches of questions of similar length, those left out of which nothing is wanted.

    Batches are cut from all questions, not from the wanted ones, so that a continued run asks in the very
    batches of an uninterrupted one.
    """
    size = asker.config.batch_size
    for start in range(0, len(questions), size * _WINDOW):
        window = range(start, min(start + size * _WINDOW, len(questions)))
        if wanted.isdisjoint(window):
            continue
        images = {i: questions.image(i) for i in window}
        order = sorted(window, key=lambda i: (images[i].size, len(questions.prompts[i]), i))
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            if wanted.isdisjoint(indices):
                continue
            pictures = [images[i] for i in indices]
            keys = stable_keys([questions.ids[i] for i in indices])
            batch = Batch(asker.vlm, pictures, [questions.prompts[i] for i in indices], keys)
            yield indices, batch, [image_digest(picture) for picture in pictures]


@torch.inference_mode()
def _answer(
    asker: Asker,
    questions: Questions,
    condition: Condition,
    indices: list[int],
    batch: Batch,
    digests: list[str],
) -> list[Record]:
    """One record for each question of the batch under one condition."""
    config, benchmark, started = asker.config, questions.benchmark, time.perf_counter()
    row = check_method(condition.method)
    try:
        reduced = prepare(
            asker.vlm,
            batch.images,
            batch.questions,
            condition.method,
            condition.keep if row.uses_keep else 1.0,
            config.choices(),
            scorer=asker.scorer(condition),
            batch=batch,
        )
        written = asker.vlm.write(reduced, benchmark.max_new_tokens, asker.schedule(condition))
    except torch.OutOfMemoryError:
        raise TokenselError(
            f"out of memory with {config.batch_size} questions at a time: give a smaller --batch-size; "
            "what is done stays done"
        ) from None
    seconds = round((time.perf_counter() - started) / len(indices), 4)
    counts = zip(reduced.n_visual.tolist(), reduced.n_visual_full.tolist())
    costs = answer_costs(
        asker.vlm.model, reduced, written, asker.selector.config if row.scorer == "selector" else None
    )
    return [
        {
            "question_id": questions.ids[i],
            "model": asker.name,
            "benchmark": benchmark.name,
            "method": condition.method,
            "keep": condition.keep,
            "seed": condition.seed,
            "question": questions.prompts[i],
            "answers": questions.answers[i],
            "image": picture,
            "prediction": prediction,
            "score": questions.score(i, prediction),
            "n_visual": n_visual,
            "n_visual_full": n_visual_full,
            "flops": flops,
            "kv_bytes": kv_bytes,
            "seconds": seconds,
        }
        for i, picture, prediction, (n_visual, n_visual_full), (flops, kv_bytes) in zip(
            indices, digests, written.texts, counts, costs
        )
    ]


def _column(field: str, questions: Questions, shelves: dict[Condition, _Shelf]) -> Scores:
    """A field of the records of every condition, in the order of the questions."""
    return {c: [float(shelf.records[name][field]) for name in questions.ids] for c, shelf in shelves.items()}
