"""Fine-tuning a vision-language model with dropped visual tokens in sight.

A language model was trained on whole images. Here it is trained on shortened prompts as well: at each step a
scorer keeps a fraction of the tokens that is drawn for that step, and in some steps everything is kept, so
that the model still answers with all tokens as well as before. The paper names training both together as
future work (Sec. 7) and says nothing on how; the choices are ours.

Trained are the layers of the language model and the norm after them, or low-rank matrices beside the linear
maps of these layers (LoRA, arXiv 2106.09685, by peft). Vision tower, projector, token embeddings and output
head stay: the scorer reads features that do not change. There is no dropout.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokensel.schedules.decoder import decoder_of
from tokensel.scorers import make_scorer
from tokensel.training.finetune_config import FinetuneConfig
from tokensel.training.frozen import (
    Record,
    answer_loss,
    draw_questions,
    load_frozen,
    run_steps,
    training_identity,
)
from tokensel.training.optim import drawn_budget, seeded
from tokensel.utils.errors import needs
from tokensel.utils.provenance import checkpoint_digest
from tokensel.utils.seeds import generator
from tokensel.vlm.forced import force, forced_logits
from tokensel.vlm.load import Vlm, load_vlm
from tokensel.vlm.reduce import reduce

__all__ = ["FinetuneConfig", "TrainedWeights", "finetune", "save_vlm", "step_keep"]


class TrainedWeights(nn.Module):
    """The parameters of a model that have gradients, alone, so that checkpoints hold these and no others."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


def step_keep(step: int, config: FinetuneConfig) -> float:
    """The fraction of each image's visual tokens that a step keeps: 1, or drawn; see ``FinetuneConfig``."""
    if torch.rand((), generator=generator(config.seed, "whole", step)).item() < config.whole:
        return 1.0
    return drawn_budget(step, config.seed, config.keep, config.keep_most)


def finetune(config: FinetuneConfig, vlm: Vlm | None = None) -> tuple[Vlm, list[Record]]:
    """Fine-tune a model; continues an earlier run in ``config.out`` that was interrupted.

    Killed at any moment, the same call ends at the weights of an undisturbed run. The result is written to
    the folder ``model`` in ``config.out``, as transformers loads it; with LoRA the matrices are added to its
    weights, and stand by themselves in the folder ``adapter``.

    Args:
        config: all choices.
        vlm: instead of ``config.model``, one in memory; its language model is changed.

    Returns:
        The fine-tuned model, and one history record per step: loss in nats per token, and fraction kept.

    Raises:
        TokenselError: no model, data or selector, a language model that is not in
            :data:`tokensel.schedules.decoder.MODELS`, a checkpoint of another training, a full disk.
        MissingPackageError: LoRA without peft.
    """
    if vlm is None:
        device = None if config.device == "auto" else config.device
        # half precision loses small steps; LoRA's own matrices are in single precision in any case
        dtype = torch.float32 if config.lora is None else None
        vlm = load_vlm(config.model, device, dtype, revision=config.revision)
    vlm, data = load_frozen(config, vlm)
    model, scorer, whose = vlm.model, None, ""
    if config.keep < 1:
        scorer = make_scorer(config.scorer, **({"selector": config.selector} if config.selector else {}))
        whose = f", scorer {config.scorer} {checkpoint_digest(config.selector) if config.selector else ''}"
    adapted = _unfreeze(vlm, config)

    def losses(step: int) -> dict[str, Tensor | float]:
        encoded, tokens, lengths = draw_questions(vlm, data, config, step)
        keep = step_keep(step, config)
        reduced = reduce(encoded, scorer, keep, thumbnail=config.thumbnail, neighbours=config.neighbours)
        forced = force(model, reduced, tokens, lengths)
        return {"loss": answer_loss(forced_logits(model, forced), forced.labels), "keep": keep}

    identity = training_identity(config, model, data) + whose
    records = run_steps(config, TrainedWeights(model), identity, losses)
    if adapted is not None:
        if config.out:
            _write_folder(
                Path(config.out) / "adapter",
                lambda part: adapted.save_pretrained(part, save_embedding_layers=False),
            )
        adapted.merge_and_unload()
    model.requires_grad_(False)
    if config.out:
        save_vlm(vlm, Path(config.out) / "model")
        vlm.name = f"{config.out}/model"
    return vlm, records


def _unfreeze(vlm: Vlm, config: FinetuneConfig) -> Any:
    """Let gradients reach what is trained; returns peft's model around it, or ``None`` without LoRA."""
    decoder = decoder_of(vlm.model)
    layers, norm = cast(nn.ModuleList, decoder.layers), cast(nn.Module, decoder.norm)
    if config.lora is None:
        layers.requires_grad_(True)
        norm.requires_grad_(True)
        return None
    with needs("lora"):
        import peft
    inside = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in vlm.model.named_modules() if id(module) in inside]
    # twice the rank, so that the rank can change without the learning rate
    shape = peft.LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules=names)
    with warnings.catch_warnings():
        # peft asks transformers for a property by the name that it had before
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return seeded(lambda: peft.get_peft_model(vlm.model, shape), config.seed)


def save_vlm(vlm: Vlm, folder: str | Path) -> None:
    """Write a model and its processor to a folder from which transformers loads them; it is whole or absent.

    What :func:`~tokensel.vlm.load.load_vlm` switched off in them is on in the folder.
    """

    def write(part: Path) -> None:
        places = [] if vlm.native is None else [vlm.model.config, vlm.processor]
        off = [place.vision_aspect_ratio for place in places]
        try:
            for place in places:
                place.vision_aspect_ratio = vlm.native
            # on the host, where every device's storage can be written
            weights = {name: value.cpu() for name, value in vlm.model.state_dict().items()}
            vlm.model.save_pretrained(part, state_dict=weights)
            vlm.processor.save_pretrained(part)
        finally:
            for place, rule in zip(places, off):
                place.vision_aspect_ratio = rule

    _write_folder(Path(folder), write)


def _write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``folder``, then move it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        write(part)
        part.chmod(0o755)
        if folder.exists():  # the same weights, from a run that ended before
            rmtree(folder)
        os.replace(part, folder)
    finally:
        rmtree(part, ignore_errors=True)
