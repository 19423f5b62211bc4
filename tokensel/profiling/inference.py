"""Time answers under every variant, round by round; report ratios to the stock model and to the ideal."""

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
from transformers import PretrainedConfig, PreTrainedModel

from tokensel.cost.count import (
    Cost,
    count_answer,
    count_decoder,
    count_layers,
    count_projector,
    count_trunk,
    count_vision,
    first_token,
    layers_read,
    step_bytes,
)
from tokensel.cost.towers import count_tower
from tokensel.methods import check_method
from tokensel.profiling.config import CostConfig
from tokensel.profiling.shapes import SHAPES
from tokensel.profiling.timing import PHASES, cpu_threads, time_answer
from tokensel.profiling.workload import FULL, MeasuredModel, Variant, schedule_of, variants
from tokensel.schedules import Schedule
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.provenance import command_line, environment, json_digest
from tokensel.utils.source import code_digest
from tokensel.vlm import Encoded, encode
from tokensel.vlm.downsample import coarse_grid
from tokensel.vlm.families import family_of
from tokensel.vlm.layout import Layout

__all__ = [
    "IDEAL",
    "Block",
    "Rounds",
    "inference_lines",
    "measure_inference",
    "quartiles",
    "summarise_inference",
]

CLOCKS = ("first_token", "further_token", "answer")
IDEAL = (
    "first_token: speed-up if latency were proportional to FLOPs, counted by formula: the stock model "
    "(encoder, projector, prefill) over what is left (encoder up to the layer that is read, selector, "
    "projector, prefill). further_token: bytes of weights and cache that a decode step reads, in full over "
    "what is left."
)


@dataclass(frozen=True)
class Block:
    """Inputs on which all variants are compared: the size of the images, and how many rows at a time."""

    image: str
    rows: int


def measure_inference(
    config: CostConfig, progress: bool = True, model: PreTrainedModel | None = None
) -> Path:
    """Measure what ``config`` names and write ``<out>/<name>.json``; after a kill, the same call resumes.

    Every round runs each variant once, in an order that rotates from round to round, so that whatever else
    the machine does affects all of them alike. A ratio compares answers of the same round.

    Args:
        config: what to measure.
        progress: show a bar on stderr.
        model: a model in memory, used instead of ``config.model``.

    Raises:
        TokenselError: nothing to load under a name, a variant that the model does not allow, or not enough
            memory.
    """
    with cpu_threads(config.threads):
        return _measure(config, progress, model)


def _measure(config: CostConfig, progress: bool, model: PreTrainedModel | None) -> Path:
    measured = MeasuredModel.of(config, model)
    machine = environment(measured.model.device) | {"threads": torch.get_num_threads()}
    rounds = Rounds.of_measurement("answers", config, machine)
    rows, every = [], variants(config)
    blocks = [Block(image, rows) for image in config.images for rows in config.batch_sizes]
    total = len(blocks) * (config.warmup + config.repetitions) * len(every)
    with tqdm(total=total, desc="cost", unit="answer", disable=not progress, file=sys.stderr) as bar:
        for block in blocks:
            inputs = measured.inputs(block.image, block.rows)
            missing = max(0, config.repetitions - len(rounds.of(block)))
            bar.update((config.repetitions - missing + (0 if missing else config.warmup)) * len(every))
            for number in range(-config.warmup if missing else 0, missing):
                times = {}
                for variant in _rotated(every, len(rounds.of(block))):
                    times[" ".join(map(str, variant))] = _answer(measured, variant, inputs, block)
                    bar.update(1)
                if number >= 0:
                    rounds.add(block, times)
            encoded = encode(measured.model, inputs)
            rows += summarise_inference(
                config, measured, block, encoded, rounds.of(block)[: config.repetitions]
            )
    report = _report(config, measured, machine, rounds, rows)
    return write_json(Path(config.out) / f"{config.name}.json", report)


def _rotated(every: list[Variant], by: int) -> list[Variant]:
    by %= len(every)
    return every[by:] + every[:by]


def _answer(
    measured: MeasuredModel, variant: Variant, inputs: dict[str, torch.Tensor], block: Block
) -> dict[str, Any]:
    try:
        return time_answer(measured, variant, inputs)
    except torch.OutOfMemoryError:
        raise TokenselError(
            f"out of memory with {block.rows} images of {block.image} at a time: give smaller batch sizes; "
            "the rounds so far are kept"
        ) from None


def _timed_code(config: CostConfig) -> str:
    """Identifies the timed code: this room, the selector, and the scorers and schedules of the methods."""
    timed = {"tokensel.profiling.training", "tokensel.profiling.timing", "tokensel.scorers.selector"}
    for method in config.methods:
        timed |= {part.__module__ for part in check_method(method).classes()}
    return code_digest(*timed)


class Rounds:
    """The rounds so far, written to disk after each one: the block and the times of each."""

    @classmethod
    def of_measurement(cls, what: str, config: CostConfig, machine: dict[str, Any]) -> "Rounds":
        """Those of one measurement; other options, another machine or other code have rounds of their own."""
        # how many rounds there are, and of which blocks, changes none of them
        changing = ("out", "repetitions", "concurrency")
        options = {key: value for key, value in asdict(config).items() if key not in changing}
        identity = json_digest([what, options, machine, _timed_code(config)])
        return cls(Path(config.out) / f"{config.name}.rounds" / f"{identity}.json")

    def __init__(self, path: Path):
        self.path = path
        self.all: list[dict[str, Any]] = []
        if path.is_file():
            try:
                self.all = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise TokenselError(f"{path}: incomplete; delete it to measure again") from None
        self.sitting = 1 + max((round["sitting"] for round in self.all), default=0)

    def of(self, block: Block) -> list[dict[str, Any]]:
        """The rounds of one block, in order."""
        return [round for round in self.all if round["block"] == asdict(block)]

    def add(self, block: Block, times: dict[str, Any]) -> None:
        """Append one round and write the file."""
        self.all.append({"block": asdict(block), "sitting": self.sitting, "times": times})
        write_json(self.path, self.all)


def summarise_inference(
    config: CostConfig, measured: MeasuredModel, block: Block, encoded: Encoded, rounds: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """One row for each variant: medians with quartiles, ratios to the stock model, and to the ideal."""
    stock = [round["times"][f"{FULL} 1.0"] for round in rounds]
    full = counted(config, measured, Variant(FULL, 1.0), encoded, stock[0]["length"], stock[0]["n_visual"])
    for variant in variants(config):
        times = [round["times"][" ".join(map(str, variant))] for round in rounds]
        cost = counted(config, measured, variant, encoded, times[0]["length"], times[0]["n_visual"])
        ideal = {"first_token": cost.speedup(full)}
        if schedule_of(variant, config) is None:
            text, rows = measured.model.config.get_text_config(), block.rows
            size = measured.model.dtype.itemsize
            full_bytes = step_bytes(text, stock[0]["length"], rows, size)
            ideal["further_token"] = full_bytes / step_bytes(text, times[0]["length"], rows, size)
        row: dict[str, Any] = asdict(block) | variant._asdict() | {"repetitions": len(rounds)}
        kept = times[0]["n_visual"]
        row |= {"n_visual": int(encoded.n_visual[0]) if kept is None else kept, "length": times[0]["length"]}
        for clock in CLOCKS:
            row[clock] = quartiles([answer[clock] for answer in times])
            gain = quartiles([before[clock] / after[clock] for before, after in zip(stock, times)])
            row[clock] |= {"speedup": gain, "ideal": ideal.get(clock)}
            if clock in ideal:
                row[clock]["of_ideal"] = gain["median"] / ideal[clock]
        row["answers_per_second"] = block.rows / row["answer"]["median"]
        row["peak_bytes"] = max((a["peak_bytes"] for a in times if a["peak_bytes"]), default=None)
        row["phases"] = {name: float(np.median([a["phases"][name] for a in times])) for name in PHASES}
        choosing = [
            (after["phases"]["selector"] + after["phases"]["selection"]) / before["first_token"]
            for before, after in zip(stock, times)
        ]
        row["choosing_of_full"] = quartiles(choosing)
        row["flops"] = asdict(cost) | {"total": cost.total}
        yield row


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": middle, "low": low, "high": high}


def counted(
    config: CostConfig,
    measured: MeasuredModel,
    variant: Variant,
    encoded: Encoded,
    length: int,
    cells: int | None = None,
) -> Cost:
    """FLOPs to the first token of all rows under a variant, from shapes alone.

    The work of ranking tokens is counted for the selector only: it is negligible for the other scorers and
    for schedules.

    Args:
        config, measured: what is measured.
        variant: the method and its keep.
        encoded: the batch, for its tiles and tokens.
        length: tokens of a row that enter the language model; needed by ``downsample``, whose grids are
            whole, and by schedules.
        cells: visual cells of a row that enter it, newlines not counted; needed by schedules.
    """
    model, layout = measured.model.config, encoded.layout
    if layout.grid is not None:
        return _counted_by_grid(config, measured, variant, layout, length, cells)
    rows, tiles = len(layout.tiles), layout.tiles[0]
    visual, newlines = int(encoded.n_visual[0]), int((~layout.cell).sum()) // rows
    read, text = layers_read(model), config.text
    row, before = check_method(variant.method), variant.method.partition("+")[0]
    if before == FULL:
        cost = first_token(model, tiles, visual, text, newlines=newlines)
    elif before == "none":
        cost = Cost(0, 0, 0, count_decoder(model.text_config, text))
    elif before in ("downsample", "pool"):
        side = model.vision_config.image_size // model.vision_config.patch_size
        high, wide = coarse_grid(variant.keep, side)
        # pooling averages what the tower makes of the whole image
        seen = high * wide if before == "downsample" else side * side
        cost = Cost(
            count_vision(model.vision_config, tiles, read, seen),
            0,
            count_projector(model, tiles * high * wide),
            count_decoder(model.text_config, length),
        )
    else:
        selector = None if row.learned is None else measured.learned[row.learned].config
        keep = variant.keep if row.chooses else 1.0
        cost = first_token(model, tiles, visual, text, keep, newlines, selector, read)
        if row.uses_question:
            reading = _count_reading(model.text_config, text + visual + newlines)
            cost = replace(cost, projector=count_projector(model, visual), prefill=cost.prefill + reading)
    if (schedule := schedule_of(variant, config)) is not None:
        assert cells is not None, "every method with a schedule counts its visual tokens"
        newlines = length - text - cells  # fewer than in the full image where it was shrunk before
        cost = replace(cost, prefill=_count_schedule(model.text_config, schedule, text, cells, newlines))
    return Cost(*(rows * part for part in asdict(cost).values()))


def _counted_by_grid(
    config: CostConfig,
    measured: MeasuredModel,
    variant: Variant,
    layout: Layout,
    length: int,
    cells: int | None,
) -> Cost:
    """:func:`counted` for a model without newlines; that all tokens are projected is a part of encoding."""
    assert layout.grid is not None, "a model without newlines names the grid of each tile"
    model, grids = measured.model.config, layout.grid.tolist()
    row, text = check_method(variant.method), model.get_text_config()
    looks = variant.method != "none"
    prefill = count_decoder(text, length)
    if (schedule := schedule_of(variant, config)) is not None:
        assert cells is not None, "every method with a schedule counts its visual tokens"
        prefill = _count_schedule(text, schedule, length - cells, cells)
    if row.uses_question:
        assert cells is not None, "every method that shortens a prompt counts its visual tokens"
        prefill += _count_reading(text, length - cells + int(layout.cell.sum()) // len(layout.tiles))
    selector = None if row.learned is None else measured.learned[row.learned].config
    return Cost(
        encoder=count_tower(model, grids) if looks else 0,
        selector=0 if selector is None else sum(count_trunk(selector, high * wide) for high, wide in grids),
        projector=0,
        prefill=len(layout.tiles) * prefill,
    )


def _count_reading(text_config: PretrainedConfig, tokens: int) -> int:
    """FLOPs of all layers over a whole prompt, which chooses what a second one keeps."""
    return count_layers(text_config, text_config.num_hidden_layers, tokens)


def _count_schedule(
    text_config: PretrainedConfig, schedule: Schedule, text: int, cells: int, newlines: int = 0
) -> int:
    """FLOPs of one row's prefill in which a schedule drops some of its cells, and perhaps its newlines."""
    entering, share = [], 1.0
    for layer in range(text_config.num_hidden_layers):
        # in the prefill every schedule that is measured gives one number for all rows
        share = float(schedule.entering(layer)) if layer in schedule.layers() else share
        kept = max(1, round(share * cells)) if share > 0 else 0
        entering.append(kept + (newlines if share == 1 or schedule.newline == "keep" else 0))
    return count_answer(text_config, text, np.array([entering]))


def _report(
    config: CostConfig,
    measured: MeasuredModel,
    machine: dict[str, Any],
    rounds: Rounds,
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    model, selector = measured.model, measured.selector
    core: Any = model.base_model
    family = family_of(model.config)
    shape = f"{selector.config.layers} x Transformer layer of width {selector.config.width}"
    return {
        "model": config.model,
        "weights": weights_of(config),
        "selector": config.selector or f"random weights, {shape}",
        "parameters": {
            "encoder": sum(weight.numel() for weight in family.tower(model).parameters()),
            "language_model": getattr(core, family.text).num_parameters(),
            "selector": selector.num_parameters(),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "machine": machine,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # not on Windows
        "sittings": max(round["sitting"] for round in rounds.all),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": asdict(config),
        "clock": "from processed pixels on the device to tokens on the host; medians with quartiles, in "
        "seconds",
        "ideal": IDEAL,
        "rows": rows,
    }


def weights_of(config: CostConfig) -> str:
    """Where the weights come from, for the record."""
    if config.random_weights or config.model in SHAPES:
        return "random, in the true shape: how long a model takes does not depend on its weights"
    return "its own"


def inference_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as a small table of text, one line for each variant."""
    yield (
        f"{'image':>9} {'rows':>4} {'method':>10} {'keep':>4} {'first token':>11} {'speed-up':>8} "
        f"{'of ideal':>8} {'choosing':>8} {'further':>9} {'answers/s':>9} {'peak':>9}"
    )
    for row in report["rows"]:
        first, peak = row["first_token"], row["peak_bytes"]
        yield (
            f"{row['image']:>9} {row['rows']:>4} {row['method']:>10} {row['keep']:>4.2g} "
            f"{first['median']:>9.4f} s {first['speedup']['median']:>8.2f} {first['of_ideal']:>8.2f} "
            f"{row['choosing_of_full']['median']:>8.1%} {1000 * row['further_token']['median']:>6.1f} ms "
            f"{row['answers_per_second']:>9.3g} {'-' if peak is None else f'{peak / 2**30:.2f} GiB':>9}"
        )
