"""Generate the missing answers of one benchmark, batch by batch, and append each to its record file."""

import time
from collections.abc import Iterator, Mapping

import torch
from tqdm import tqdm

from tokensel.benchmarks.conditions import Condition
from tokensel.benchmarks.questions import Questions, image_digest, stable_keys
from tokensel.benchmarks.record_files import RecordFile, begin_record, missing_questions
from tokensel.benchmarks.records import Record, append_records
from tokensel.benchmarks.session import EvalSession
from tokensel.benchmarks.shards import Shard
from tokensel.cost import answer_work
from tokensel.methods import Batch, check_method, prepare
from tokensel.utils.errors import TokenselError
from tokensel.utils.provenance import device_name, package_versions

__all__ = ["answer_missing"]

_MAKERS = ("torch", "transformers")  # their versions are recorded with each answer, and the device
_WINDOW = 8  # batches within which questions are sorted by length


def answer_missing(
    session: EvalSession,
    questions: Questions,
    files: Mapping[Condition, RecordFile],
    shard: Shard,
    bar: tqdm,
) -> int:
    """Generate what is missing in ``files``; all conditions of a batch share one run of the vision tower.

    Returns:
        The number of new answers. Each batch is on the disk before the next one begins.
    """
    missing = {condition: set(missing_questions(questions, file)) for condition, file in files.items()}
    wanted, count = set().union(*missing.values()), 0
    for indices, batch, image_digests in _batches(session, questions, wanted, shard):
        for condition, file in files.items():
            if missing[condition].isdisjoint(indices):
                continue
            bar.set_description(
                f"{questions.benchmark.name}, {condition.method} {condition.keep:g}", refresh=False
            )
            records = _answer(session, questions, condition, indices, batch, image_digests)
            # a kill in the middle of a write can leave a part of a batch; the records that exist stay
            new = [record for i, record in zip(indices, records) if i in missing[condition]]
            append_records(file.path, new)
            file.add(new)
            count += len(new)
            bar.update(len(new))
    return count


def _batches(
    session: EvalSession, questions: Questions, wanted: set[int], shard: Shard
) -> Iterator[tuple[list[int], Batch, list[str | None]]]:
    """Batches of questions of similar length: their numbers, the batch, and the digests of their images.

    Batches are cut from all questions, not from the wanted ones, so that a resumed evaluation pads the same
    questions together as an uninterrupted one. Batches without a wanted question are left out.
    """
    size = session.config.batch_size
    for start in range(0, len(questions), size * _WINDOW):
        window = range(start, min(start + size * _WINDOW, len(questions)))
        if wanted.isdisjoint(window) or not any(shard.holds(i // size) for i in window[::size]):
            continue
        order = sorted(window, key=lambda i: (questions.size(i), len(questions.prompts[i]), i))
        for first in range(0, len(order), size):
            indices = order[first : first + size]
            if wanted.isdisjoint(indices) or not shard.holds((start + first) // size):
                continue
            images = [questions.image(i) for i in indices]
            keys = stable_keys([questions.ids[i] for i in indices])
            batch = Batch(session.vlm, images, [questions.prompts[i] for i in indices], keys)
            yield indices, batch, [image_digest(image) for image in images]


@torch.inference_mode()
def _answer(
    session: EvalSession,
    questions: Questions,
    condition: Condition,
    indices: list[int],
    batch: Batch,
    image_digests: list[str | None],
) -> list[Record]:
    """One record for each question of the batch under one condition."""
    config, benchmark, started = session.config, questions.benchmark, time.perf_counter()
    row = check_method(condition.method)
    try:
        keep = condition.keep if row.uses_keep else 1.0
        reduced = prepare(batch, condition.method, keep, config.choices(), session.scorer(condition))
        output = session.vlm.generate_output(reduced, benchmark.max_new_tokens, session.schedule(condition))
    except torch.OutOfMemoryError:
        raise TokenselError(
            f"out of memory with {config.batch_size} questions at a time: give a smaller --batch-size; "
            "the answers so far are kept"
        ) from None
    seconds = round((time.perf_counter() - started) / len(indices), 4)
    work = answer_work(session.vlm.model, reduced, output)
    n_visual, n_visual_full = reduced.n_visual.tolist(), reduced.n_visual_full.tolist()
    return [
        {
            **begin_record(questions, i, condition, session.name, image_digests[place]),
            "prediction": output.texts[place],
            "n_visual": n_visual[place],
            "n_visual_full": n_visual_full[place],
            "work": work[place],
            "seconds": seconds,
            "versions": package_versions(_MAKERS) | {"device": device_name(session.vlm.model.device)},
        }
        for place, i in enumerate(indices)
    ]
