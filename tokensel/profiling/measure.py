"""Rounds of answers under every condition, and what they say: ratios to the stock model, and to the ideal."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from tokensel.cost.count import (
    Cost,
    count_answer,
    count_decoder,
    count_projector,
    count_vision,
    first_token,
    layers_read,
    step_bytes,
)  # fmt: skip
from tokensel.methods import check_method
from tokensel.profiling.config import CostConfig
from tokensel.profiling.shapes import SHAPES
from tokensel.profiling.subject import FULL, Condition, Subject, conditions, make_inputs, schedule_of
from tokensel.profiling.timing import PHASES, time_answer
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.provenance import code_digest, command_line, digest, environment
from tokensel.vlm import Encoded, encode
from tokensel.vlm.downsample import coarse_grid

CLOCKS = ("first_token", "further_token", "answer")
IDEAL = (
    "first_token: FLOPs of the stock model (encoder, projector, prefill) over the FLOPs that are left (encoder up to the "
    "layer that is read, selector, projector, prefill), counted by formula; so many times as fast would the first token "
    "come, if time followed the arithmetic. further_token: bytes of weights and cache that a step reads, in full over "
    "what is left."
)


@dataclass(frozen=True)
class Block:
    """Inputs of one kind, under which all conditions are compared: pictures of one size, so many at a time."""

    image: str
    rows: int


def measure(config: CostConfig, progress: bool = True, model: PreTrainedModel | None = None) -> Path:
    """Measure what ``config`` names and write ``<out>/<name>.json``; killed, the same call goes on where it was.

    Every round runs each condition once, in an order that moves on from round to round, so that whatever else the
    machine does falls on all alike; a ratio compares the answers of one round.

    Args:
        config: what to measure.
        progress: show a bar on stderr.
        model: a model in memory instead of ``config.model``.

    Raises:
        TokenselError: nothing to load under a name, a condition the model does not allow, or not enough memory.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    subject = Subject.of(config, model)
    machine = environment(subject.model.device) | {"threads": torch.get_num_threads()}
    rounds = Rounds.of_measurement("answers", config, machine)
    found, ways = [], conditions(config)
    blocks = [Block(image, rows) for image in config.images for rows in config.batch_sizes]
    total = len(blocks) * (config.warmup + config.repetitions) * len(ways)
    with tqdm(total=total, desc="cost", unit="answer", disable=not progress, file=sys.stderr) as bar:
        for block in blocks:
            inputs = make_inputs(subject.model, block.image, block.rows, config.text, config.seed)
            missing = max(0, config.repetitions - len(rounds.of(block)))
            bar.update((config.repetitions - missing + (0 if missing else config.warmup)) * len(ways))
            for number in range(-config.warmup if missing else 0, missing):
                times = {}
                for condition in _rotated(ways, len(rounds.of(block))):
                    times[" ".join(map(str, condition))] = _answer(subject, condition, inputs, block)
                    bar.update(1)
                if number >= 0:
                    rounds.add(block, times)
            found += summarise(
                config, subject, block, encode(subject.model, inputs), rounds.of(block)[: config.repetitions]
            )
    return write_json(
        Path(config.out) / f"{config.name}.json", _report(config, subject, machine, rounds, found)
    )


def _rotated(ways: list[Condition], by: int) -> list[Condition]:
    by %= len(ways)
    return ways[by:] + ways[:by]


def _answer(
    subject: Subject, condition: Condition, inputs: dict[str, torch.Tensor], block: Block
) -> dict[str, Any]:
    try:
        return time_answer(subject, condition, inputs)
    except torch.OutOfMemoryError:
        raise TokenselError(
            f"out of memory with {block.rows} pictures of {block.image} at a time: give smaller batch sizes; "
            "what is done stays done"
        ) from None


class Rounds:
    """The rounds that are done, on disk after each: by block, what was timed in each."""

    @classmethod
    def of_measurement(cls, what: str, config: CostConfig, machine: dict[str, Any]) -> "Rounds":
        """Those of one measurement; another one, another machine or other code has rounds of its own."""
        asked = {key: value for key, value in asdict(config).items() if key not in ("out", "repetitions")}
        named = digest([what, asked, machine, code_digest()])
        return cls(Path(config.out) / f"{config.name}.rounds" / f"{named}.json")

    def __init__(self, path: Path):
        self.path = path
        self.all: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.all = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise TokenselError(f"{path}: not whole; delete it to measure again") from None
        self.sitting = 1 + max((each["sitting"] for each in self.all), default=0)

    def of(self, block: Block) -> list[dict[str, Any]]:
        """The rounds of one block, in order."""
        return [each for each in self.all if each["block"] == asdict(block)]

    def add(self, block: Block, times: dict[str, Any]) -> None:
        """Keep one more."""
        self.all.append({"block": asdict(block), "sitting": self.sitting, "times": times})
        write_json(self.path, self.all)


def summarise(
    config: CostConfig, subject: Subject, block: Block, encoded: Encoded, rounds: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row a condition: medians with their quartiles, ratios to the stock model, and to the ideal."""
    stock = [each["times"][f"{FULL} 1.0"] for each in rounds]
    full = counted(config, subject, Condition(FULL, 1.0), encoded, stock[0]["length"])
    for condition in conditions(config):
        mine = [each["times"][" ".join(map(str, condition))] for each in rounds]
        cost = counted(config, subject, condition, encoded, mine[0]["length"])
        ideal = {"first_token": cost.speedup(full)}
        if schedule_of(condition, config) is None:
            text, rows = subject.model.config.text_config, block.rows
            size = subject.model.dtype.itemsize
            lengths = stock[0]["length"], mine[0]["length"]
            ideal["further_token"] = step_bytes(text, lengths[0], rows, size) / step_bytes(
                text, lengths[1], rows, size
            )
        row = asdict(block) | condition._asdict() | {"repetitions": len(rounds)}
        kept = mine[0]["n_visual"]
        row |= {"n_visual": int(encoded.n_visual[0]) if kept is None else kept, "length": mine[0]["length"]}
        for clock in CLOCKS:
            row[clock] = spread([each[clock] for each in mine])
            gain = spread([before[clock] / after[clock] for before, after in zip(stock, mine)])
            row[clock] |= {"speedup": gain, "ideal": ideal.get(clock)}
            if clock in ideal:
                row[clock]["of_ideal"] = gain["median"] / ideal[clock]
        row["answers_per_second"] = block.rows / row["answer"]["median"]
        row["peak_bytes"] = max((each["peak_bytes"] for each in mine if each["peak_bytes"]), default=None)
        row["phases"] = {name: float(np.median([each["phases"][name] for each in mine])) for name in PHASES}
        choosing = [
            (after["phases"]["selector"] + after["phases"]["selection"]) / before["first_token"]
            for before, after in zip(stock, mine)
        ]
        row["choosing_of_full"] = spread(choosing)
        row["flops"] = asdict(cost) | {"total": cost.total}
        yield row


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


def counted(
    config: CostConfig, subject: Subject, condition: Condition, encoded: Encoded, length: int
) -> Cost:
    """FLOPs to the first token of all rows under a condition, from shapes alone.

    What ranks tokens is counted for the selector only: the other scorers and the schedules do next to none.

    Args:
        config, subject: what is measured.
        condition: the method and its keep.
        encoded: the batch, for its tiles and tokens.
        length: tokens of a row that entered the language model; read where whole grids decide it, and by schedules.
    """
    model, layout = subject.model.config, encoded.layout
    rows, tiles = len(layout.tiles), layout.tiles[0]
    visual, newlines = int(encoded.n_visual[0]), int((~layout.cell).sum()) // rows
    read, text = layers_read(model), config.text
    row, before = check_method(condition.method), condition.method.partition("+")[0]
    if before == FULL:
        cost = first_token(model, tiles, visual, text, newlines=newlines)
    elif before == "none":
        cost = Cost(0, 0, 0, count_decoder(model.text_config, text))
    elif before == "downsample":
        side = model.vision_config.image_size // model.vision_config.patch_size
        high, wide = coarse_grid(condition.keep, side)
        cost = Cost(
            count_vision(model.vision_config, tiles, read, high * wide),
            0,
            count_projector(model, tiles * high * wide),
            count_decoder(model.text_config, length),
        )
    else:
        mine = subject.selector.config if row.uses_selector else None
        cost = first_token(
            model, tiles, visual, text, condition.keep if row.chooses else 1.0, newlines, mine, read
        )
    if (schedule := schedule_of(condition, config)) is not None:
        entering, share = [], 1.0
        for layer in range(model.text_config.num_hidden_layers):
            share = schedule.entering(layer) if layer in schedule.layers() else share
            entering.append(round(share * (length - text)))
        cost = replace(cost, prefill=count_answer(model.text_config, text, np.array([entering])))
    return Cost(*(rows * part for part in asdict(cost).values()))


def _report(
    config: CostConfig, subject: Subject, machine: dict[str, Any], rounds: Rounds, found: list[dict[str, Any]]
) -> dict[str, Any]:
    model, selector = subject.model, subject.selector
    shape = f"{selector.config.layers} x Transformer layer of width {selector.config.width}"
    return {
        "model": config.model,
        "weights": weights_of(config),
        "selector": config.selector or f"random weights, {shape}",
        "parameters": {
            "encoder": model.base_model.vision_tower.num_parameters(),
            "language_model": model.base_model.language_model.num_parameters(),
            "selector": selector.num_parameters(),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.text_config._attn_implementation,
        "machine": machine,
        "load_average": os.getloadavg()[0],
        "sittings": max(each["sitting"] for each in rounds.all),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": asdict(config),
        "clock": "from processed pixels on the device to tokens on the host; medians with quartiles, in seconds",
        "ideal": IDEAL,
        "rows": found,
    }


def weights_of(config: CostConfig) -> str:
    """Where the weights come from, for the record."""
    if config.random_weights or config.model in SHAPES:
        return "random, in the true shape: how long a model takes does not depend on its weights"
    return "its own"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as a small table of text, a line a condition."""
    yield (
        f"{'image':>9} {'rows':>4} {'method':>10} {'keep':>4} {'first token':>11} {'speed-up':>8} {'of ideal':>8} "
        + (f"{'choosing':>8} {'further':>9} {'answers/s':>9} {'peak':>9}")
    )
    for row in report["rows"]:
        first, peak = row["first_token"], row["peak_bytes"]
        yield (
            f"{row['image']:>9} {row['rows']:>4} {row['method']:>10} {row['keep']:>4.2g} "
            f"{first['median']:>9.4f} s {first['speedup']['median']:>8.2f} {first['of_ideal']:>8.2f} "
            f"{row['choosing_of_full']['median']:>8.1%} {1000 * row['further_token']['median']:>6.1f} ms "
            f"{row['answers_per_second']:>9.3g} {'-' if peak is None else f'{peak / 2**30:.2f} GiB':>9}"
        )
