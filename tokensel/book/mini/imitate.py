"""A tower that no label reaches learns to say what a finished model's language model expects to hear.

Training a language model to read through another tower takes hours. So the tower learns, together with a
projector of its own, to give what the finished model's projector gives for the same tile; the language model
stays as it is. Where the tower keeps what it knows, and how long its tokens are, is left to it: only the
projector's output is compared. Directions in which that output hardly varies count as much as the others:
the place of a patch varies it most, and the letters least.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from tokensel.book.mini.packing import tiles
from tokensel.book.mini.world import DRAW, draw_page
from tokensel.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from tokensel.utils.provenance import checkpoint_digest
from tokensel.vlm import load_vlm

__all__ = ["imitate"]

_WARMUP, _MEASURED = 200, 240  # steps; pages on which the teacher's output is measured
_FLOOR = 0.03  # of the mean variance, added to that of each direction


def imitate(
    start: Path,
    teacher: Path,
    out: Path,
    steps: int = 9000,
    pages: int = 6,
    rate: float = 1e-3,
    seed: int = 0,
    save_every: int = 200,
) -> Path:
    """Train tower and projector of one small LLaVA-NeXT to give what another's projector gives.

    Args:
        start: the model whose tower goes on learning.
        teacher: the finished model.
        out: folder for ``checkpoint.safetensors``, from which a killed training goes on, and ``model/``.
        steps: optimiser steps.
        pages: drawn for each of them.
        rate: peak learning rate; it falls to 0 along half a cosine.
        seed: of the pages.
        save_every: steps between checkpoints.

    Returns:
        The folder of the model: the teacher's, with the tower and the projector that have learned.

    Raises:
        TokenselError: the checkpoint in ``out`` is of another imitation.
    """
    model, finished = (load_vlm(folder, device="cpu").model for folder in (start, teacher))
    own, told = model.base_model, finished.base_model
    learned = nn.ModuleDict({name: getattr(own, name) for name in ("vision_tower", "multi_modal_projector")})
    learned.requires_grad_(True)
    told.requires_grad_(False)
    # layers behind the one that is read have no gradient, and no moments to be saved
    _said(own, _pixels(seed, 0, 1)).sum().backward()
    for weight in learned.parameters():
        weight.requires_grad_(weight.grad is not None)
    whiten = _whitening(told, seed)
    optimizer = torch.optim.AdamW(learned.parameters(), rate, weight_decay=0.01)
    options = {"steps": steps, "pages": pages, "rate": rate, "seed": seed}
    identity = " ".join(checkpoint_digest(str(folder)) for folder in (start, teacher))
    progress = load_checkpoint(out, learned, optimizer, identity, options) or Progress(0, 1.0, identity, {})
    first = progress.step
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="imitate", unit="step", mininterval=10)
    for step in bar:
        pixels = _pixels(seed, step, pages)
        with torch.no_grad():
            wanted = _said(told, pixels) @ whiten
        loss = (_said(own, pixels) @ whiten - wanted).square().sum()
        loss = loss / (wanted - wanted.mean(dim=(0, 1))).square().sum()  # 1 is the mean token
        factor = min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = factor * rate
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0:
            save_checkpoint(out, learned, optimizer, replace(progress, step=step + 1), options)
    for name in learned:
        getattr(told, name).load_state_dict(getattr(own, name).state_dict())
    vlm = load_vlm(teacher, device="cpu")
    finished.save_pretrained(out / "model")
    vlm.processor.save_pretrained(out / "model")
    return out / "model"


def _said(core: Any, pixels: Tensor) -> Float[Tensor, "tiles cells width"]:
    """The projector's output for every patch."""
    states = core.vision_tower(pixels, output_hidden_states=True).hidden_states
    return core.multi_modal_projector(
        states[core.config.vision_feature_layer][:, 1:]
    )  # without the CLS token


def _pixels(seed: int, step: int, pages: int) -> Float[Tensor, "tiles 3 height width"]:
    """The tiles of a step's pages, which its number decides."""
    draw = np.random.default_rng([seed, step])
    tasks = draw.choice(list(DRAW), pages)
    places = draw.integers(100_000, size=pages)
    return torch.cat([tiles(draw_page(str(task), "train", int(i))) for task, i in zip(tasks, places)])


@torch.no_grad()
def _whitening(told: Any, seed: int) -> Float[Tensor, "width width"]:
    """What makes the teacher's output uncorrelated and, but for a floor, of unit variance."""
    said = torch.cat(
        [_said(told, _pixels(seed + 1, step, 8)).flatten(0, 1) for step in range(_MEASURED // 8)]
    )
    values, vectors = torch.linalg.eigh(torch.cov(said.double().T))
    return (vectors * (values.clamp(min=0) + _FLOOR * values.mean()).rsqrt()).float()
