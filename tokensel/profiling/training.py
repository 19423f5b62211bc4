"""How fast a selector trains, beside the fastest that this machine multiplies matrices."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tokensel.cost.count import count_training, count_vision, layers_read
from tokensel.data.features import Features
from tokensel.data.tower import run_tower
from tokensel.profiling.config import CostConfig
from tokensel.profiling.measure import Block, Rounds, spread, weights_of
from tokensel.profiling.subject import build_model
from tokensel.profiling.timing import watch_peak
from tokensel.training.autoencoder import Autoencoder
from tokensel.training.config import TrainConfig
from tokensel.training.optim import adamw, seeded, use_bf16
from tokensel.training.processes import Processes
from tokensel.training.train import train_step
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.provenance import command_line, environment

PAPER_IMAGES = 100_000  # of COCO, Sec. 4.5
ROUND = ("multiply", "encode", "train")


class Workshop:
    """One batch, and three things to do with it: train on its features, encode it, and a bare product of matrices."""

    def __init__(self, config: CostConfig, model: PreTrainedModel, rows: int):
        """
        Args:
            config: depth of the selector, precision and seed.
            model: whose tower makes the features.
            rows: pictures of the batch, one tile each.

        Raises:
            TokenselError: a precision in which no selector is trained.
        """
        precision = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}.get(config.dtype)
        if precision is None:
            raise TokenselError(f"dtype is {config.dtype}: a selector trains in float32 or bfloat16")
        device = model.device
        self.config = TrainConfig(
            layers=config.selector_layers, batch_size=rows, seed=config.seed, precision=precision,
            device="cpu" if device.type == "cpu" else "auto",
        )  # fmt: skip
        self.processes = Processes(device)
        dtype = torch.bfloat16 if use_bf16(device, self.config) else torch.float32
        self.llava, vision = model.config, model.config.vision_config
        self.tower = model.base_model.vision_tower.to(dtype)
        noise = torch.Generator().manual_seed(config.seed)
        size = (rows, vision.num_channels, vision.image_size, vision.image_size)
        self.pixels = torch.randn(*size, generator=noise).to(device, dtype)
        self.features = Features(self.encode().clone())
        width = self.features.tokens.shape[-1]
        self.learner = seeded(lambda: Autoencoder(width, *self.config.shape), config.seed).to(device)
        self.selector = self.learner.selector.config
        self.optimizer = adamw(self.learner, self.config)
        self.step = 0
        # the largest product of the training itself: all tokens through the first half of an MLP
        self.left = self.features.tokens.flatten(0, 1)
        self.right = torch.randn(width, int(width * self.config.mlp_ratio), generator=noise).to(self.left)
        self.products = max(1, count_training(self.selector, *self._shape()) // (10 * self._product()))

    def _shape(self) -> tuple[int, int]:
        rows, tokens, _ = self.features.tokens.shape
        return tokens, rows

    def _product(self) -> int:
        return 2 * self.left.numel() * self.right.shape[1]

    def encode(self) -> Tensor:
        """The tower over the batch."""
        drop_cls = self.llava.vision_feature_select_strategy == "default"
        return run_tower(self.tower, self.pixels, self.llava.vision_feature_layer, drop_cls)[0]

    def train(self) -> None:
        """The very step of :func:`tokensel.training.train.train`."""
        train_step(self.processes, self.learner, self.optimizer, self.features, self.step, self.config, 1.0)
        self.step += 1

    def multiply(self) -> None:
        """Products that together are about a tenth of a training step."""
        for _ in range(self.products):
            torch.mm(self.left, self.right)

    def flops(self) -> dict[str, int]:
        """Of one call of each."""
        return {
            "multiply": self.products * self._product(),
            "encode": count_vision(
                self.llava.vision_config, self._shape()[1], layers=layers_read(self.llava)
            ),
            "train": count_training(self.selector, *self._shape()),
        }


def measure(config: CostConfig, progress: bool = True, model: PreTrainedModel | None = None) -> Path:
    """Measure training at every batch size of ``config`` and write ``<out>/<name>.json``; resumes as measuring answers does.

    Args:
        config: model, depth of the selector, batch sizes, repetitions, precision; the rest does not matter here.
        progress: show a bar on stderr.
        model: a model in memory instead of ``config.model``.

    Raises:
        TokenselError: nothing to load under the model's name, or a precision in which no selector is trained.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    model = build_model(config) if model is None else model
    machine = environment(model.device) | {"threads": torch.get_num_threads()}
    rounds = Rounds.of_measurement("training", config, machine)
    rows = []
    total = len(config.batch_sizes) * (config.warmup + config.repetitions)
    with tqdm(total=total, desc="training", unit="round", disable=not progress, file=sys.stderr) as bar:
        for size in config.batch_sizes:
            block, workshop = Block("training", size), Workshop(config, model, size)
            missing = max(0, config.repetitions - len(rounds.of(block)))
            bar.update(config.repetitions - missing + (0 if missing else config.warmup))
            for number in range(-config.warmup if missing else 0, missing):
                peak = watch_peak(model.device)
                times = {name: _seconds(getattr(workshop, name), model.device) for name in ROUND}
                if number >= 0:
                    rounds.add(block, times | {"peak_bytes": peak()})
                bar.update(1)
            rows.append(
                summarise(workshop, size, [each["times"] for each in rounds.of(block)[: config.repetitions]])
            )
    report = {
        "model": config.model,
        "weights": weights_of(config),
        "selector_layers": config.selector_layers,
        "dtype": str(workshop.left.dtype).removeprefix("torch."),
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": asdict(config),
        "ceiling": "FLOP/s of one product of all tokens of the batch with a matrix of the selector's MLP, same precision",
        "rows": rows,
    }
    return write_json(Path(config.out) / f"{config.name}.json", report)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    started = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def summarise(workshop: Workshop, size: int, times: list[dict[str, float]]) -> dict[str, Any]:
    """Images a second, share of the ceiling, hours for the paper's pictures, medians with quartiles; and peak memory.

    "features" trains on features that are there, "pictures" encodes each batch first; the ceiling of a round is that of
    the products of the same round.
    """
    flops, found = workshop.flops(), {"batch": size, "repetitions": len(times)}
    ceilings = [flops["multiply"] / each["multiply"] for each in times]
    found["ceiling_flops_per_second"] = spread(ceilings)
    found["peak_bytes"] = max((each["peak_bytes"] for each in times if each["peak_bytes"]), default=None)
    for name, parts in {"features": ("train",), "pictures": ("encode", "train")}.items():
        seconds = [sum(each[part] for part in parts) for each in times]
        work = sum(flops[part] for part in parts)
        speed = spread([size / each for each in seconds])
        found[name] = {
            "images_per_second": speed,
            "of_ceiling": spread([work / each / ceiling for each, ceiling in zip(seconds, ceilings)]),
            "flops_per_image": work // size,
            "hours_for_100k_images": PAPER_IMAGES / speed["median"] / 3600,
        }
    return found


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as a small table of text."""
    yield f"{'batch':>5} {'from':>9} {'images/s':>9} {'of ceiling':>10} {'100K images':>12} {'peak':>9}"
    for row in report["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        for name in ("features", "pictures"):
            part = row[name]
            yield (
                f"{row['batch']:>5} {name:>9} {part['images_per_second']['median']:>9.4g} "
                f"{part['of_ceiling']['median']:>10.2f} {part['hours_for_100k_images']:>10.2f} h {peak:>9}"
            )
