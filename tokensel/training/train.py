"""Training selector and reconstructor together: the loop of Sec. 4.4."""

import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from tokensel.data.encoders import VisionEncoder
from tokensel.data.feature_cache import build_cache
from tokensel.data.features import Features
from tokensel.data.image_sources import open_images
from tokensel.data.loader import FeatureLoader, ImageFeatureLoader, StoredFeatureLoader
from tokensel.model.gumbel import gumbel_noise
from tokensel.model.objective import objective
from tokensel.model.reconstructor import TokenReconstructor
from tokensel.model.selector import TokenSelector
from tokensel.training.autoencoder import Autoencoder, MaskedAutoencoder
from tokensel.training.checkpoint import (
    History,
    load_checkpoint,
    remove_partial_files,
    save_checkpoint,
)
from tokensel.training.config import TrainConfig
from tokensel.training.first_tiles import calibrate, first_batches, measure_statistics
from tokensel.training.judge import reconstruction_error, train_reconstructor
from tokensel.training.metrics import Metric, in_features, open_metric
from tokensel.training.optim import (
    adamw,
    drawn_budget,
    learning_rate,
    mean_over_processes,
    optimizer_step,
    seeded,
    temperature,
    use_bf16,
)
from tokensel.training.processes import Processes, launched_processes
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import write_json
from tokensel.utils.seeds import generator
from tokensel.vlm.family_encoder import load_encoder

__all__ = [
    "MaskedAutoencoder",
    "TrainConfig",
    "Trained",
    "reconstruction_error",
    "train",
    "train_reconstructor",
    "train_step",
]


@dataclass
class Trained:
    """What a training returns: the two models on the CPU, one history record per step, images left out."""

    selector: TokenSelector
    reconstructor: TokenReconstructor
    history: list[dict[str, float | int]]
    skipped: list[str] = field(default_factory=list)


def train(
    config: TrainConfig,
    images: Any = None,
    features: Features | None = None,
    encoder: VisionEncoder | None = None,
    at_save: Callable[[int, Autoencoder], None] | None = None,
) -> Trained:
    """Train a selector and its reconstructor by Eq. (7).

    Killed at any moment, the same call continues from the last checkpoint in ``config.out`` and ends at the
    weights of an undisturbed run: each step's data and noise depend on the seed and the step's number alone.
    Under ``accelerate launch`` or ``torchrun`` each process computes its slice of every batch.

    Args:
        config: all choices.
        images: instead of ``config.images``: whatever :func:`tokensel.data.image_sources.open_images` takes.
        features: ready-made features instead of images; no encoder is needed then.
        encoder: instead of ``config.encoder``, one in memory; with ``features``, the one that made them.
        at_save: is called after each checkpoint of ``config.out``, in the main process, with the number of
            steps and the two models, which it must leave as they are.

    Raises:
        TokenselError: no images, no encoder, a checkpoint cut short or of another training, a full disk.
    """
    with launched_processes(config.device) as processes:
        return _train(config, processes, images, features, encoder, at_save)


def _train(
    config: TrainConfig,
    processes: Processes,
    images: Any,
    features: Features | None,
    encoder: VisionEncoder | None,
    at_save: Callable[[int, Autoencoder], None] | None,
) -> Trained:
    local_rows = processes.local_rows(config.batch_size)
    loader = open_loader(config, processes, images, features, encoder)
    model = seeded(lambda: Autoencoder(loader.width, *config.shape), config.seed).to(processes.device)
    model.prepare_for(config.gate)
    optimizer = adamw(model, config)
    out = Path(config.out) if config.out else None
    config, metric = open_metric(config, processes, loader, images, lambda: first_batches(loader, config))
    # "auto" may mean another precision on another machine, and the result would differ
    options = config.to_dict() | {"precision": "bf16" if use_bf16(processes.device, config) else "fp32"}
    progress = load_checkpoint(out, model, optimizer, loader.identity, options) if out else None
    reported: set[str] = set(progress.loader.get("skipped", ())) if progress else set()
    if progress is None:
        progress = measure_statistics(model, loader, config, metric)
    loader.restore(progress.loader)
    processes.gather(None)  # all have read the checkpoint before the main process writes the next
    history = History(out if processes.is_main else None, progress.step)
    if out and processes.is_main:
        remove_partial_files(out)
        write_json(out / "train.json", config.to_dict())

    parallel_model = processes.parallel(model)
    bar = tqdm(
        total=config.steps,
        initial=progress.step,
        desc="train",
        unit="step",
        disable=not (processes.is_main and config.progress),
    )
    recent: list[tuple[int, float, Tensor]] = []  # steps that are not in the history yet
    clock = time.monotonic()
    with closing(loader.batches(progress.step, config.batch_size, local_rows, config.seed)) as batches, bar:
        for step in range(progress.step, config.steps):
            batch = next(batches).to(processes.device)
            values = train_step(
                processes, parallel_model, optimizer, batch, step, config, progress.scale, metric
            )
            recent.append((step + 1, temperature(step, config), values))
            for name in sorted(set(loader.skipped) - reported):
                reported.add(name)
                tqdm.write(f"skipped {name}: cannot be read", file=sys.stderr)
            last = step + 1 == config.steps
            saving = last or (step + 1) % config.save_every == 0
            if (saving and out) or last or (step + 1) % config.log_every == 0:
                rate = len(recent) * config.batch_size / max(time.monotonic() - clock, 1e-9)
                history.extend(history_records(recent, rate, config))
                newest = history.records[-1]
                bar.update(step + 1 - bar.n)
                bar.set_postfix(
                    L_rec=f"{newest['l_rec']:.3f}", L_pr=f"{newest['l_pr']:.3f}", images_s=f"{rate:.0f}"
                )
                recent, clock = [], time.monotonic()
            if saving and out and processes.is_main:
                now = replace(progress, step=step + 1, loader=loader.state())
                save_checkpoint(out, model, optimizer, now, options)
                if at_save:
                    at_save(step + 1, model)

    skipped = sorted({name for names in processes.gather(list(loader.skipped)) for name in names})
    if skipped and processes.is_main:
        names = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        tqdm.write(f"skipped {len(skipped)} of the images, which cannot be read: {names}", file=sys.stderr)
    model.to("cpu").eval()
    calibrate(model.selector, loader, config)
    record_training(model, config, loader, progress.scale, history)
    if out and processes.is_main:
        model.selector.save_pretrained(out / "selector")
        model.reconstructor.save_pretrained(out / "reconstructor")
    processes.gather(None)  # no process returns before the files are written
    return Trained(model.selector, model.reconstructor, history.records, skipped)


def train_step(
    processes: Processes,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Features,
    step: int,
    config: TrainConfig,
    scale: float,
    metric: Metric = in_features,
) -> Float[Tensor, "3"]:
    """One step on one batch: sample the masks, reconstruct, and take an optimizer step on Eq. (7).

    Args:
        processes: this process among those that train; ``Processes(device)`` for one alone.
        model, optimizer: the :class:`~tokensel.training.autoencoder.Autoencoder` and its optimizer.
        batch: the features of this process's slice of the batch, on the device.
        step: its number, from 0, which decides noise, temperature and learning rate.
        config: all choices.
        scale: the distance that counts as 1.
        metric: maps features to the space where the distance is measured.

    Returns:
        The loss, L_rec and L_pr, on the device.
    """
    # the noise of the whole batch is drawn, so that it does not depend on the number of processes
    rows = processes.local_rows(config.batch_size)
    draw = generator(config.seed, "noise", step)
    noise = gumbel_noise(config.batch_size, batch.tokens.shape[1], 2, generator=draw)[rows]
    p = drawn_budget(step, config.seed, config.p, config.p_most)
    gate: dict[str, Any] = {} if batch.grid is None else {"grid": batch.grid}
    if config.gate != "gumbel":
        gate |= {"gate": config.gate, "keep": p, "total": processes.sum}
    if config.gate == "throttle":
        sizes = config.batch_size, *batch.tokens.shape[1:]
        gate["throttle"] = torch.randn(sizes, generator=draw)[rows].to(processes.device)
    with processes.autocast(use_bf16(processes.device, config)):
        reconstructed, mask = model(
            batch.tokens, batch.valid, temperature(step, config), noise.to(processes.device), **gate
        )
    # in single precision: a difference of rounded values would be mostly rounding
    measured = metric(reconstructed.float()), metric(batch.tokens.float())
    mean = mean_over_processes(processes, batch.valid)
    loss, l_rec, l_pr = objective(*measured, mask, p, scale, batch.valid, mean=mean)
    optimizer_step(model, optimizer, loss, step, config)
    return torch.stack([loss, l_rec, l_pr]).detach()


def open_loader(
    config: TrainConfig,
    processes: Processes,
    images: Any,
    features: Features | None,
    encoder: VisionEncoder | None,
) -> FeatureLoader:
    """Where the features come from: memory, the cache on disk, or images encoded when they are needed.

    Raises:
        TokenselError: nothing to train on, no encoder, or one that cannot be loaded.
    """
    if features is not None:
        return StoredFeatureLoader(features, encoder=encoder)
    if (isinstance(images, str) and not images) or (images is None and not config.images):
        raise TokenselError("images is empty: give a folder of images, a parquet file or a Hub dataset")
    if encoder is None and not config.encoder:
        raise TokenselError(
            "encoder is empty: give the Hub id or folder of a vision tower or of a vision-language model"
        )
    source = open_images(
        config.images if images is None else images, config.column, config.streaming, config.limit
    )
    if encoder is None:
        dtype = torch.bfloat16 if use_bf16(processes.device, config) else torch.float32
        encoder = load_encoder(config.encoder, processes.device, dtype)
    encoder.to(processes.device)
    if encoder.ragged and processes.count > 1:
        # a step's noise would depend on which images a process has
        raise TokenselError(f"{encoder.name} makes more tokens of larger images: train on one process")
    if not config.cache:
        return ImageFeatureLoader(source, encoder, config.tiles, config.workers)
    if not processes.is_main:
        processes.gather(None)  # until the main process has written the cache
    show = config.progress and processes.is_main
    cache = build_cache(config.cache, source, encoder, config.tiles, progress=show)
    if processes.is_main:
        processes.gather(None)
    return StoredFeatureLoader(cache, source.name, encoder)


def history_records(
    recent: list[tuple[int, float, Tensor]], rate: float, config: TrainConfig
) -> list[dict[str, float | int]]:
    """History records of some steps; their values leave the device together, not one by one."""
    values = torch.stack([value for _, _, value in recent]).cpu().tolist()
    return [
        {
            "step": step,
            "loss": loss,
            "l_rec": l_rec,
            "l_pr": l_pr,
            "tau": tau,
            "lr": learning_rate(step - 1, config),
            "images_per_second": round(rate, 2),
        }
        for (step, tau, _), (loss, l_rec, l_pr) in zip(recent, values, strict=True)
    ]


def record_training(
    model: Autoencoder, config: TrainConfig, loader: FeatureLoader, scale: float, history: History
) -> None:
    """Write into both models' configurations, and so their cards, how they were trained and their losses."""
    last = [record for record in history.records if record["step"] > 0.9 * config.steps]
    encoder = loader.encoder
    facts = {
        "keep": config.p,
        "keep_most": config.p_most,
        "gate": config.gate,
        "metric": config.metric,
        "tau_start": config.tau_start,
        "tau_end": config.tau_end,
        "training_data": loader.name,
        "steps": config.steps,
        "seed": config.seed,
        "scale": scale,
        "encoder": encoder.name if encoder else config.encoder,
        "tower": encoder.kind if encoder else "",
        "feature_layer": encoder.feature_layer if encoder else None,
        "drop_cls": encoder.drop_cls if encoder else None,
        "l_rec": sum(record["l_rec"] for record in last) / max(1, len(last)),
        "l_pr": sum(record["l_pr"] for record in last) / max(1, len(last)),
    }
    model.selector.config.update(facts)
    model.reconstructor.config.update(facts)
