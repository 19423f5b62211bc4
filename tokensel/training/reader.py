"""How much the language model notices an error of a visual token: a metric for the reconstruction."""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from tokensel.data.image_sources import ImageSource
from tokensel.methods import Batch
from tokensel.training.config import TrainConfig
from tokensel.training.processes import Processes
from tokensel.utils.errors import TokenselError
from tokensel.utils.files import load_tensors, save_tensors
from tokensel.utils.provenance import checkpoint_digest
from tokensel.vlm.forced import IGNORED, force, forced_logits
from tokensel.vlm.model import Vlm
from tokensel.vlm.reduce import reduce

__all__ = ["reader_sensitivity", "stored_sensitivity"]

_FILE = "reader.safetensors"


def reader_sensitivity(
    vlm: Vlm,
    images: Iterable[Any],
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "width width"]:
    """The matrix A for which ``||(F_rec - F) A||`` estimates how much an error changes the answers.

    The model answers each prompt about each image; no labels are needed. With g the gradient of the answer's
    negative log-likelihood by a token of F, an error e of that token changes it by g.e to first order. A is
    the root of the mean of g g^T over tokens, images and prompts (an empirical Fisher matrix), so the mean
    square of g.e is ``||e A||^2``.

    Args:
        vlm: the model that will read the tokens; it is not changed.
        images: unlabelled images, each whatever ``Vlm.inputs`` takes.
        prompts: what is asked about each of them.
        max_new_tokens: of an answer.
        batch_size: questions answered at once.
        progress: show a bar on stderr.

    Raises:
        TokenselError: no image or prompt; a model whose projector cannot be given other features, or whose
            language model is not known here.
    """
    questions = [(image, prompt) for image in images for prompt in prompts]
    if not questions:
        raise TokenselError("no image or no prompt: give at least one of each")
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with tqdm(total=len(questions), desc="reader", disable=not progress) as bar:
        for start in range(0, len(questions), batch_size):
            rows = questions[start : start + batch_size]
            shown, asked = [image for image, _ in rows], [prompt for _, prompt in rows]
            gradients = answer_gradients(vlm, shown, asked, max_new_tokens)
            total = total + (gradients.T @ gradients).cpu().double()
            tokens += len(gradients)
            bar.update(len(rows))
    values, vectors = torch.linalg.eigh(total / tokens)
    return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()


def stored_sensitivity(
    config: TrainConfig, processes: Processes, source: ImageSource, load: Callable[[], Vlm], name: str
) -> Float[Tensor, "width width"]:
    """:func:`reader_sensitivity` on the images of a training; read from its cache or ``out`` if it is there.

    Args:
        config: the training's choices.
        processes: those that train; only the first one measures, if there is a folder to share the result.
        source: the images, at most ``config.metric_images``.
        load: loads the model.
        name: its folder or Hub id.
    """
    made_from = json.dumps(
        [checkpoint_digest(name), source.identity(), config.metric_images, config.metric_prompts]
    )
    folder = config.cache or config.out  # the cache serves several trainings
    path = Path(folder) / _FILE if folder else None

    def stored() -> Tensor | None:
        if path is None or not path.exists():
            return None
        tensors, header = load_tensors(path)
        return tensors["sensitivity"] if header.get("made_from") == made_from else None

    matrix = stored()
    if matrix is None and (path is None or processes.is_main):
        opened = (source.open(*row) for row in islice(source.stream(), config.metric_images))
        images = [image for image in opened if image is not None]
        show = config.progress and processes.is_main
        matrix = reader_sensitivity(load(), images, config.metric_prompts, progress=show)
        if path is not None:
            save_tensors(path, {"sensitivity": matrix}, {"made_from": made_from})
    processes.gather(None)  # until the first process has written it
    return cast(Tensor, stored() if matrix is None else matrix)


def answer_gradients(
    vlm: Vlm, images: Sequence[Any], prompts: Sequence[str], max_new_tokens: int
) -> Float[Tensor, "cells width"]:
    """Gradient by each visual token of the negative log-likelihood of the model's own answers."""
    encoded = Batch(vlm, images, prompts).seeing
    reduced = reduce(encoded)
    output = vlm.generate_output(reduced, max_new_tokens)
    with torch.enable_grad():
        tokens = encoded.features.tokens.detach().clone().requires_grad_()
        visual = encoded.family.project(encoded, torch.ones_like(encoded.layout.cell), tokens)
        forced = force(vlm.model, reduced.with_visual(visual), output.tokens, output.lengths)
        logits = forced_logits(vlm.model, forced)
        loss = functional.cross_entropy(
            logits.flatten(0, 1), forced.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, tokens)
    return gradient.float()[encoded.layout.valid.to(gradient.device)]
