"""How fast a selector trains, compared with the fastest matrix products of this machine."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from tokensel.cost.count import count_training, count_vision, layers_read
from tokensel.data.features import Features
from tokensel.data.tower import run_tower
from tokensel.profiling.config import CostConfig
from tokensel.profiling.inference import Block, Rounds, quartiles, weights_of
from tokensel.profiling.timing import cpu_threads, watch_peak
from tokensel.profiling.workload import build_vlm
from tokensel.training.autoencoder import Autoencoder
from tokensel.training.config import TrainConfig
from tokensel.training.optim import adamw, seeded, use_bf16
from tokensel.training.processes import Processes
from tokensel.training.train import train_step
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.provenance import command_line, environment
from tokensel.vlm.families import check_tiled

PAPER_IMAGES = 100_000  # of COCO, Sec. 4.5
ROUND = ("multiply", "encode", "train")
PRECISIONS: dict[str, Literal["auto", "fp32", "bf16"]] = {
    "auto": "auto",
    "float32": "fp32",
    "bfloat16": "bf16",
}


class TrainingBenchmark:
    """Times matmul peak, encoding and a training step on one batch."""

    def __init__(self, config: CostConfig, model: PreTrainedModel, rows: int):
        """
        Args:
            config: depth of the selector, precision and seed.
            model: its tower computes the features.
            rows: images of the batch, one tile each.

        Raises:
            TokenselError: a precision in which selectors are not trained.
        """
        if config.dtype not in PRECISIONS:
            raise TokenselError(f"dtype is {config.dtype}: a selector trains in float32 or bfloat16")
        device = model.device
        self.config = TrainConfig(
            layers=config.selector_layers,
            batch_size=rows,
            seed=config.seed,
            precision=PRECISIONS[config.dtype],
            device="cpu" if device.type == "cpu" else "auto",
        )
        self.processes = Processes(device)
        dtype = torch.bfloat16 if use_bf16(device, self.config) else torch.float32
        self.llava, vision = model.config, model.config.vision_config
        core: Any = model.base_model
        self.tower = core.vision_tower.to(dtype)
        noise = torch.Generator().manual_seed(config.seed)
        size = (rows, vision.num_channels, vision.image_size, vision.image_size)
        self.pixels = torch.randn(*size, generator=noise).to(device, dtype)
        self.features = Features(self.encode().clone())
        width = self.features.tokens.shape[-1]
        self.learner = seeded(lambda: Autoencoder(width, *self.config.shape), config.seed).to(device)
        self.selector = self.learner.selector.config
        self.optimizer = adamw(self.learner, self.config)
        self.step = 0
        # the largest product within a training step: all tokens times the first matrix of an MLP
        self.left = self.features.tokens.flatten(0, 1)
        self.right = torch.randn(width, int(width * self.config.mlp_ratio), generator=noise).to(self.left)
        self.products = max(1, count_training(self.selector, *self._shape()) // (10 * self._product()))

    def _shape(self) -> tuple[int, int]:
        rows, tokens, _ = self.features.tokens.shape
        return tokens, rows

    def _product(self) -> int:
        return 2 * self.left.numel() * self.right.shape[1]

    def encode(self) -> Tensor:
        """Run the tower over the batch."""
        drop_cls = self.llava.vision_feature_select_strategy == "default"
        return run_tower(self.tower, self.pixels, self.llava.vision_feature_layer, drop_cls)[0]

    def train(self) -> None:
        """One step of :func:`tokensel.training.train.train`."""
        train_step(self.processes, self.learner, self.optimizer, self.features, self.step, self.config, 1.0)
        self.step += 1

    def multiply(self) -> None:
        """Products that together have about a tenth of the FLOPs of a training step."""
        for _ in range(self.products):
            torch.mm(self.left, self.right)

    def flops(self) -> dict[str, int]:
        """FLOPs of one call of each."""
        return {
            "multiply": self.products * self._product(),
            "encode": count_vision(
                self.llava.vision_config, self._shape()[1], layers=layers_read(self.llava)
            ),
            "train": count_training(self.selector, *self._shape()),
        }


def measure_training(config: CostConfig, progress: bool = True, model: PreTrainedModel | None = None) -> Path:
    """Measure training at every batch size of ``config`` and write ``<out>/<name>.json``.

    After a kill, the same call resumes.

    Args:
        config: model, depth of the selector, batch sizes, repetitions, precision; other options have no
            effect.
        progress: show a bar on stderr.
        model: a model in memory, used instead of ``config.model``.

    Raises:
        TokenselError: nothing to load under the model's name, a model that is no LLaVA-NeXT or
            LLaVA-OneVision, or a precision in which selectors are not trained.
    """
    with cpu_threads(config.threads):
        return _measure(config, progress, build_vlm(config).model if model is None else model)


def _measure(config: CostConfig, progress: bool, model: PreTrainedModel) -> Path:
    check_tiled(model.config, "cost --training")
    machine = environment(model.device) | {"threads": torch.get_num_threads()}
    rounds = Rounds.of_measurement("training", config, machine)
    rows = []
    total = len(config.batch_sizes) * (config.warmup + config.repetitions)
    with tqdm(total=total, desc="training", unit="round", disable=not progress, file=sys.stderr) as bar:
        for size in config.batch_sizes:
            block, bench = Block("training", size), TrainingBenchmark(config, model, size)
            missing = max(0, config.repetitions - len(rounds.of(block)))
            bar.update(config.repetitions - missing + (0 if missing else config.warmup))
            for number in range(-config.warmup if missing else 0, missing):
                peak = watch_peak(model.device)
                times = {name: _seconds(getattr(bench, name), model.device) for name in ROUND}
                if number >= 0:
                    rounds.add(block, times | {"peak_bytes": peak()})
                bar.update(1)
            times = [round["times"] for round in rounds.of(block)[: config.repetitions]]
            rows.append(summarise_training(bench, size, times))
    report = {
        "model": config.model,
        "weights": weights_of(config),
        "selector_layers": config.selector_layers,
        "dtype": str(bench.left.dtype).removeprefix("torch."),
        "machine": machine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "config": asdict(config),
        "ceiling": "FLOP/s of one product of all tokens of the batch with a matrix of the selector's MLP, "
        "same precision",
        "rows": rows,
    }
    return write_json(Path(config.out) / f"{config.name}.json", report)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    started = perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - started


def summarise_training(bench: TrainingBenchmark, size: int, times: list[dict[str, float]]) -> dict[str, Any]:
    """Images a second, share of the matmul peak, hours for the paper's images, and peak memory.

    "features" trains on features that exist already, "images" encodes each batch first. The peak of a round
    is that of the matrix products of the same round.
    """
    flops = bench.flops()
    ceilings = [flops["multiply"] / round["multiply"] for round in times]
    row: dict[str, Any] = {"batch": size, "repetitions": len(times)}
    row["ceiling_flops_per_second"] = quartiles(ceilings)
    row["peak_bytes"] = max((round["peak_bytes"] for round in times if round["peak_bytes"]), default=None)
    for name, parts in {"features": ("train",), "images": ("encode", "train")}.items():
        seconds = [sum(round[part] for part in parts) for round in times]
        work = sum(flops[part] for part in parts)
        speed = quartiles([size / duration for duration in seconds])
        row[name] = {
            "images_per_second": speed,
            "of_ceiling": quartiles(
                [work / duration / ceiling for duration, ceiling in zip(seconds, ceilings)]
            ),
            "flops_per_image": work // size,
            "hours_for_100k_images": PAPER_IMAGES / speed["median"] / 3600,
        }
    return row


def training_lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as a small table of text."""
    yield f"{'batch':>5} {'from':>9} {'images/s':>9} {'of ceiling':>10} {'100K images':>12} {'peak':>9}"
    for row in report["rows"]:
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
        for name in ("features", "images"):
            part = row[name]
            yield (
                f"{row['batch']:>5} {name:>9} {part['images_per_second']['median']:>9.4g} "
                f"{part['of_ceiling']['median']:>10.2f} {part['hours_for_100k_images']:>10.2f} h {peak:>9}"
            )
