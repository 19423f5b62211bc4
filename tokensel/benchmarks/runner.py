"""Ask every question in every way, keep each answer at once, merge them into tables in the end."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from tokensel.benchmarks.asker import Asker
from tokensel.benchmarks.conditions import Condition, parse_pairs
from tokensel.benchmarks.config import EvalConfig
from tokensel.benchmarks.questions import Questions, image_digest, load_questions, stable_keys
from tokensel.benchmarks.records import Record, append_records, read_records, sole_writer
from tokensel.benchmarks.results import (
    CATEGORIES,
    DIFFERENCES,
    Costs,
    Sheet,
    category_rows,
    difference_rows,
    score_rows,
    write_table,
)
from tokensel.benchmarks.shards import Shard, is_first_here
from tokensel.benchmarks.table import Benchmark
from tokensel.cost import answer_costs
from tokensel.methods import Batch, check_method, prepare
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.progress import progress_bar
from tokensel.utils.provenance import command_line, digest, environment

_WINDOW = 8  # batches of which the questions are sorted by length
_SPOT_CHECKS = 16  # pictures of recorded questions that are compared before the records are continued


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation left on the disk.

    Attributes:
        table: the long table, one row a benchmark, method, keep and seed.
        differences: paired differences between methods.
        categories: the long table again, by category, of benchmarks that have any.
        provenance: what was run, on what, when, for how long.
        computed: answers generated now; the others were there already.
        left: answers that other parts of the sweep still owe; the tables are ``None`` until there are none.
    """

    table: Path | None
    differences: Path | None
    categories: Path | None
    provenance: Path | None
    computed: int
    left: int = 0


@dataclass
class _Shelf:
    """The records of one benchmark under one condition: on disk whole, in memory the scores by question id.

    Attributes:
        path: where this process writes.
        scores: of all that is answered, by whichever process.
        flops, kv_bytes, seconds: what those answers took together.
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
        """Take note of records that are on the disk."""
        for record in records:
            self.scores[record["question_id"]] = record["score"]
            self.flops += record["flops"]
            self.kv_bytes += record["kv_bytes"]
            self.seconds += record["seconds"]


def evaluate(config: EvalConfig, progress: bool = True) -> Evaluation:
    """Run an evaluation to its end, from wherever an earlier run was stopped.

    Every answer is one JSON line below ``<out>/records``, on the disk before the next batch is asked. A later
    run with the same model, selector, choices and code takes what is there and asks the rest; with others it
    keeps records of its own. Scores depend on neither batch size nor order nor the number of interruptions,
    processes and machines: each part of a split sweep writes files of its own, all read all of them, and
    whichever part ends last writes the tables. Where two evaluations want answers of the same model on the
    same benchmark in the same ``out``, one waits for the other and takes what that one computed.

    Args:
        config: what to run.
        progress: show a bar on stderr.

    Returns:
        Where the tables are.

    Raises:
        TokenselError: the model, the selector, the data or the disk is not as it must be, see the line.
    """
    started = time.perf_counter()
    shard = Shard.of(config.shard)
    benchmarks = config.suite_benchmarks()
    asker = Asker(config)
    config = asker.config  # with the keeps of this model
    asker.check_fit()
    questions = [load_questions(benchmark, config.split, config.n) for benchmark in benchmarks.values()]
    records = Path(config.out) / "records"
    shelves = [_open_shelves(asker, each, records, shard) for each in questions]
    total = sum(len(each) * len(mine) for each, mine in zip(questions, shelves))
    missing, computed = _count_missing(questions, shelves), 0
    share = -(-missing // shard.count)  # of the split, about
    shown = progress and is_first_here()
    with progress_bar(total - missing + share, done=total - missing, unit="answers", shown=shown) as bar:
        for i, each in enumerate(questions):
            if before := _count_missing([each], [shelves[i]]):
                lock = records / each.benchmark.name / f".lock-{asker.model_digest}"
                note = partial(bar.set_description, f"{each.benchmark.name}: another evaluation is at it")
                with sole_writer(lock, shard, waiting=note):
                    shelves[i] = _open_shelves(
                        asker, each, records, shard, held=True
                    )  # others have gone on meanwhile
                    if shard.count == 1:
                        bar.update(before - _count_missing([each], [shelves[i]]))
                    computed += _ask(asker, each, shelves[i], shard, bar)
    if shard.count > 1:
        shelves = [_open_shelves(asker, each, records, shard) for each in questions]
        if left := _count_missing(questions, shelves):
            return Evaluation(None, None, None, None, computed, left)
    sheets = [
        Sheet.of(
            each.benchmark,
            {condition: [shelf.scores[name] for name in each.ids] for condition, shelf in mine.items()},
            each.clusters,
            each.categories,
        )
        for each, mine in zip(questions, shelves)
    ]
    provenance = {
        "model": {"name": config.model, "digest": asker.model_digest, "dtype": str(asker.vlm.model.dtype)},
        "data": {each.benchmark.name: len(each) for each in questions}
        | {"suite": config.suite, "split": config.split},
        "sources": {each.benchmark.name: each.source for each in questions if each.source},
        **environment(asker.vlm.model.device),
        "seed": config.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": config.to_dict(),
        "answers": total,
        "answers_computed_now": computed,
        "wall_seconds_now": round(time.perf_counter() - started, 1),
        "generation_seconds_in_all": round(
            sum(shelf.seconds for mine in shelves for shelf in mine.values()), 1
        ),
    }
    costs = [{condition: shelf.costs for condition, shelf in mine.items()} for mine in shelves]
    return _write_tables(
        asker.name, config, list(zip(benchmarks.values(), sheets, costs)), provenance, computed
    )


def _write_tables(
    model: str,
    config: EvalConfig,
    sheets: list[tuple[Benchmark, Sheet, Costs]],
    provenance: dict,
    computed: int,
) -> Evaluation:
    """All tables of a finished sweep."""
    pairs, seed, stem = parse_pairs(config.compare), config.seed, Path(config.out) / config.name
    rows, differences, categories = [], [], []
    for benchmark, sheet, costs in sheets:
        rows += score_rows(model, benchmark, sheet.scores, costs, seed=seed, strata=sheet.strata)
        differences += difference_rows(model, benchmark, sheet.scores, pairs, seed=seed, strata=sheet.strata)
        categories += category_rows(model, benchmark, sheet, seed=seed)
    return Evaluation(
        table=write_table(f"{stem}.csv", rows),
        differences=write_table(f"{stem}.differences.csv", differences, DIFFERENCES),
        categories=write_table(f"{stem}.categories.csv", categories, CATEGORIES) if categories else None,
        provenance=write_json(f"{stem}.provenance.json", provenance),
        computed=computed,
    )


def _open_shelves(
    asker: Asker, questions: Questions, folder: Path, shard: Shard, *, held: bool = False
) -> dict[Condition, _Shelf]:
    """The records there are for each condition, made sure to belong to these questions; for writing if they are ``held``."""
    benchmark, shelves = questions.benchmark, {}
    number = {name: i for i, name in enumerate(questions.ids)}
    pictures: dict[int, str | None] = {}
    for condition in asker.config.conditions():
        task = {"metric": benchmark.metric, "max_new_tokens": benchmark.max_new_tokens}
        made = digest(asker.identity(condition) | task)
        stem = f"keep-{condition.keep:g}_seed-{condition.seed}_{made}"
        place = folder / benchmark.name / condition.method
        shelf = shelves[condition] = _Shelf(place / f"{stem}{shard.name}.jsonl")
        for path in [place / f"{stem}.jsonl", *sorted(place.glob(f"{stem}.*-of-*.jsonl"))]:
            for name, record in read_records(path, mine=held and path == shelf.path).items():
                if name in number and name not in shelf.scores:
                    questions.check_record(number[name], record)
                    pictures[number[name]] = record["image"]
                    shelf.add([record])
    for i in sorted(pictures)[:: max(1, len(pictures) // _SPOT_CHECKS)]:
        questions.check_image(i, pictures[i])
    return shelves


def _missing(questions: Questions, shelf: _Shelf) -> list[int]:
    return [i for i, name in enumerate(questions.ids) if name not in shelf.scores]


def _count_missing(questions: list[Questions], shelves: list[dict[Condition, _Shelf]]) -> int:
    return sum(
        len(_missing(each, shelf)) for each, mine in zip(questions, shelves) for shelf in mine.values()
    )


def _ask(
    asker: Asker, questions: Questions, shelves: dict[Condition, _Shelf], shard: Shard, bar: tqdm
) -> int:
    """Fill the shelves: one batch at a time, all its conditions on one run of the vision tower; returns how many answers."""
    missing = {condition: set(_missing(questions, shelf)) for condition, shelf in shelves.items()}
    wanted, asked = set().union(*missing.values()), 0
    for indices, batch, digests in _batches(asker, questions, wanted, shard):
        for condition, shelf in shelves.items():
            if not missing[condition].isdisjoint(indices):
                bar.set_description(
                    f"{questions.benchmark.name}, {condition.method} {condition.keep:g}", refresh=False
                )
                records = _answer(asker, questions, condition, indices, batch, digests)
                # after a kill in the middle of a write a batch may be there in part: what is there stays
                new = [record for i, record in zip(indices, records) if i in missing[condition]]
                append_records(shelf.path, new)
                shelf.add(new)
                asked += len(new)
                bar.update(len(new))
    return asked


def _batches(
    asker: Asker, questions: Questions, wanted: set[int], shard: Shard
) -> Iterator[tuple[list[int], Batch, list[str | None]]]:
    """Batches of questions of similar length, those left out of which nothing is wanted.

    Batches are cut from all questions, not from the wanted ones, so that a continued run asks in the very
    batches of an uninterrupted one.
    """
    size = asker.config.batch_size
    for start in range(0, len(questions), size * _WINDOW):
        window = range(start, min(start + size * _WINDOW, len(questions)))
        if wanted.isdisjoint(window) or not any(shard.holds(i // size) for i in window[::size]):
            continue
        order = sorted(window, key=lambda i: (questions.size(i), len(questions.prompts[i]), i))
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            if wanted.isdisjoint(indices) or not shard.holds((start + first) // size):
                continue
            pictures = [questions.image(i) for i in indices]
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
    digests: list[str | None],
) -> list[Record]:
    """One record for each question of the batch under one condition."""
    config, benchmark, started = asker.config, questions.benchmark, time.perf_counter()
    row = check_method(condition.method)
    try:
        keep = condition.keep if row.uses_keep else 1.0
        reduced = prepare(batch, condition.method, keep, config.choices(), asker.scorer(condition))
        output = asker.vlm.generate_output(reduced, benchmark.max_new_tokens, asker.schedule(condition))
    except torch.OutOfMemoryError:
        raise TokenselError(
            f"out of memory with {config.batch_size} questions at a time: give a smaller --batch-size; "
            "what is done stays done"
        ) from None
    seconds = round((time.perf_counter() - started) / len(indices), 4)
    counts = zip(reduced.n_visual.tolist(), reduced.n_visual_full.tolist())
    costs = answer_costs(
        asker.vlm.model, reduced, output, asker.selector.config if row.uses_selector else None
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
            indices, digests, output.texts, counts, costs
        )
    ]
