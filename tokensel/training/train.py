"""Training selector and reconstructor together: the loop of Sec. 4.4."""

import sys
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from tokensel.data.encoders import VisionEncoder
from tokensel.data.feature_cache import build_cache
from tokensel.data.features import Features
from tokensel.data.images import open_images
from tokensel.data.loader import Feed, ImageFeed, StoredFeed
from tokensel.model.gumbel import gumbel_noise
from tokensel.model.objective import objective
from tokensel.model.reconstructor import TokenReconstructor
from tokensel.model.selector import TokenSelector
from tokensel.training.autoencoder import Autoencoder, MaskedAutoencoder, Statistics
from tokensel.training.checkpoint import History, Progress, load_checkpoint, save_checkpoint, sweep
from tokensel.training.config import TrainConfig
from tokensel.training.judge import reconstruction_error, train_reconstructor
from tokensel.training.optim import (
    adamw,
    autocast,
    descend,
    learning_rate,
    mean_over_processes,
    seeded,
    slice_of,
    temperature,
    use_bf16,
)  # fmt: skip
from tokensel.utils.errors import TokenselError, needs
from tokensel.utils.files import write_json
from tokensel.utils.seeds import generator

with needs("train"):
    from accelerate import Accelerator
    from accelerate.utils import gather_object

__all__ = [
    "MaskedAutoencoder",
    "TrainConfig",
    "Trained",
    "reconstruction_error",
    "train",
    "train_reconstructor",
]


@dataclass
class Trained:
    """What a training returns: the two models on the CPU, one history record a step, pictures left out."""

    selector: TokenSelector
    reconstructor: TokenReconstructor
    history: list[dict[str, float | int]]
    skipped: list[str] = field(default_factory=list)


def train(
    config: TrainConfig,
    images: Any = None,
    features: Features | None = None,
    encoder: VisionEncoder | None = None,
) -> Trained:
    """Train a selector and its reconstructor by Eq. (7).

    Killed at any moment, the same call goes on from the last checkpoint in ``config.out`` and ends at the
    weights of an undisturbed run: each step's data and noise depend on the seed and the step's number alone.
    Under ``accelerate launch`` each process takes its slice of every batch.

    Args:
        config: all choices.
        images: pictures instead of ``config.images``: whatever :func:`tokensel.data.images.open_images` takes.
        features: ready-made features instead of pictures; no encoder is needed then.
        encoder: instead of ``config.encoder``, one in memory; beside ``features``, the one that made them.

    Raises:
        TokenselError: no pictures, no encoder, a checkpoint cut short or of another training, a full disk.
    """
    accelerator = Accelerator(cpu=config.device == "cpu")
    mine = slice_of(config.batch_size, accelerator.process_index, accelerator.num_processes)
    feed = open_feed(config, accelerator, images, features, encoder)
    model = seeded(lambda: Autoencoder(feed.width, *config.shape), config.seed).to(accelerator.device)
    optimizer = adamw(model, config)
    out = Path(config.out) if config.out else None
    progress = load_checkpoint(out, model, optimizer, feed.identity, config.to_dict()) if out else None
    told: set[str] = set(progress.feed.get("skipped", ())) if progress else set()
    if progress is None:
        progress = begin(model, feed, config)
    feed.restore(progress.feed)
    main = accelerator.is_main_process
    accelerator.wait_for_everyone()  # all have read the checkpoint before the first writes the next
    history = History(out if main else None, progress.step)
    if out and main:
        sweep(out)
        write_json(out / "train.json", config.to_dict())

    whole = accelerator.prepare(model)
    bar = tqdm(total=config.steps, initial=progress.step, desc="train", unit="step",
               disable=not (main and config.progress))  # fmt: skip
    recent: list[tuple[int, float, Tensor]] = []
    clock = time.monotonic()
    with closing(feed.batches(progress.step, config.batch_size, mine, config.seed)) as batches, bar:
        for step in range(progress.step, config.steps):
            batch = next(batches).to(accelerator.device)
            values = train_step(accelerator, whole, optimizer, batch, step, config, progress.scale, mine)
            recent.append((step + 1, temperature(step, config), values))
            for name in sorted(set(feed.skipped) - told):
                told.add(name)
                tqdm.write(f"skipped {name}: cannot be read", file=sys.stderr)
            last = step + 1 == config.steps
            saving = out is not None and (last or (step + 1) % config.save_every == 0)
            if saving or last or (step + 1) % config.log_every == 0:
                rate = len(recent) * config.batch_size / max(time.monotonic() - clock, 1e-9)
                history.extend(records(recent, rate, config))
                newest = history.records[-1]
                bar.update(step + 1 - bar.n)
                bar.set_postfix(
                    L_rec=f"{newest['l_rec']:.3f}", L_pr=f"{newest['l_pr']:.3f}", images_s=f"{rate:.0f}"
                )
                recent, clock = [], time.monotonic()
            if saving and main:
                now = replace(progress, step=step + 1, feed=feed.state())
                save_checkpoint(out, model, optimizer, now, config.to_dict())

    skipped = sorted(set(gather_object(list(feed.skipped))))
    if skipped and main:
        named = ", ".join(skipped[:5]) + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else "")
        tqdm.write(f"skipped {len(skipped)} of the images, which cannot be read: {named}", file=sys.stderr)
    model.to("cpu").eval()
    describe(model, config, feed, progress.scale, history)
    if out and main:
        model.selector.save_pretrained(out / "selector")
        model.reconstructor.save_pretrained(out / "reconstructor")
    accelerator.wait_for_everyone()
    return Trained(model.selector, model.reconstructor, history.records, skipped)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Features,
    step: int,
    config: TrainConfig,
    scale: float,
    mine: slice = slice(None),
) -> Float[Tensor, "3"]:
    """One step on one batch: draw the masks, reconstruct, and descend along Eq. (7).

    Args:
        accelerator, model, optimizer: the :class:`~tokensel.training.autoencoder.Autoencoder` and what trains it.
        batch: the features of this process's slice of the batch, on the device.
        step: its number, from 0, on which noise, temperature and learning rate depend.
        config: all choices.
        scale: the distance that counts as 1.
        mine: this process's slice.

    Returns:
        The loss, L_rec and L_pr, on the device.
    """
    shape = (config.batch_size, batch.tokens.shape[1], 2)
    noise = gumbel_noise(*shape, generator=generator(config.seed, "noise", step))[mine]
    with autocast(accelerator, config):
        reconstructed, mask = model(
            batch.tokens, batch.valid, temperature(step, config), noise.to(accelerator.device)
        )
    loss, l_rec, l_pr = objective(
        reconstructed, batch.tokens, mask, config.p, scale, batch.valid,
        mean=mean_over_processes(accelerator, batch.valid),
    )  # fmt: skip
    descend(accelerator, model, optimizer, loss, step, config)
    return torch.stack([loss, l_rec, l_pr]).detach()


def open_feed(
    config: TrainConfig,
    accelerator: Accelerator,
    images: Any,
    features: Features | None,
    encoder: VisionEncoder | None,
) -> Feed:
    """Where the features come from: memory, the cache on disk, or pictures encoded as they come.

    Raises:
        TokenselError: nothing to train on, no encoder, or one that cannot be loaded.
    """
    if features is not None:
        return StoredFeed(features, encoder=encoder)
    if images is None and not config.images:
        raise TokenselError("images is empty: give a folder of images, a parquet file or a hub dataset")
    if encoder is None and not config.encoder:
        raise TokenselError(
            "encoder is empty: give the hub id or folder of a vision tower or of a LLaVA checkpoint"
        )
    source = open_images(
        config.images if images is None else images, config.column, config.streaming, config.limit
    )
    if encoder is None:
        dtype = torch.bfloat16 if use_bf16(accelerator, config) else torch.float32
        encoder = VisionEncoder.from_pretrained(config.encoder, accelerator.device, dtype)
    encoder.to(accelerator.device)
    if not config.cache:
        return ImageFeed(source, encoder, config.tiles, config.workers)
    with accelerator.main_process_first():
        show = config.progress and accelerator.is_main_process
        cache = build_cache(config.cache, source, encoder, config.tiles, progress=show)
    return StoredFeed(cache, source.name, encoder)


def begin(model: Autoencoder, feed: Feed, config: TrainConfig) -> Progress:
    """Step 0: measure the features' statistics on the first tiles of the walk and give them to the models.

    Every process reads the same whole batches, so that all get the same numbers; never more of them than
    will be trained on.
    """
    count = min(config.steps, -(-config.statistics_tiles // config.batch_size))
    with closing(feed.batches(0, config.batch_size, slice(0, config.batch_size), config.seed)) as batches:
        statistics = Statistics.of(islice(batches, count))
    model.standardise(statistics.center, statistics.spread)
    return Progress(0, statistics.scale, feed.identity, feed.state())


def records(
    recent: list[tuple[int, float, Tensor]], rate: float, config: TrainConfig
) -> list[dict[str, float | int]]:
    """History records of some steps; their values leave the device together, not one by one."""
    values = torch.stack([value for _, _, value in recent]).cpu().tolist()
    return [
        {"step": step, "loss": loss, "l_rec": l_rec, "l_pr": l_pr, "tau": tau,
         "lr": learning_rate(step - 1, config), "images_per_second": round(rate, 2)}
        for (step, tau, _), (loss, l_rec, l_pr) in zip(recent, values, strict=True)
    ]  # fmt: skip


def describe(model: Autoencoder, config: TrainConfig, feed: Feed, scale: float, history: History) -> None:
    """Tell both models' configurations, and so their cards, how they were trained and how well it went."""
    last = [record for record in history.records if record["step"] > 0.9 * config.steps]
    facts = dict(
        keep=config.p, tau_start=config.tau_start, tau_end=config.tau_end, training_data=feed.name,
        steps=config.steps, seed=config.seed, scale=scale,
        encoder=feed.encoder.name if feed.encoder else config.encoder,
        feature_layer=feed.encoder.feature_layer if feed.encoder else None,
        drop_cls=feed.encoder.drop_cls if feed.encoder else None,
        l_rec=sum(record["l_rec"] for record in last) / max(1, len(last)),
        l_pr=sum(record["l_pr"] for record in last) / max(1, len(last)),
    )  # fmt: skip
    model.selector.config.update(facts)
    model.reconstructor.config.update(facts)
