"""Training a scorer of visual tokens by the answers of a frozen model: DiffPrune and VisionSelector.

Both read the question's image, weigh its tokens by a soft top-k whose weights sum to the budget, and change
the tokens by their weights before the language model reads them. The loss is the cross entropy of the
reference answer, so that the gradient tells which tokens the model needed. Nothing of the model is trained,
and at inference the best-scored tokens are kept as they are.

What we chose, where the descriptions leave it open: the budget is one of each image, over all its tiles
together, as it is at inference; statistics of features come from the first batches.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from tokensel.benchmarks.questions import Questions
from tokensel.model.answered import AnsweredModel
from tokensel.model.diffprune import Denoiser, DiffPrune, DiffPruneConfig
from tokensel.model.gates import soft_top_k, threshold
from tokensel.model.visionselector import VisionSelector, VisionSelectorConfig
from tokensel.schedules.decoder import decoder_of
from tokensel.training.autoencoder import Statistics
from tokensel.training.config import AnswersConfig
from tokensel.training.frozen import (
    Record,
    answer_loss,
    draw_questions,
    load_frozen,
    run_steps,
    training_facts,
    training_identity,
)
from tokensel.training.optim import drawn_budget, seeded
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import generator
from tokensel.vlm.encoded import Encoded
from tokensel.vlm.families import family_of
from tokensel.vlm.forced import force, forced_logits
from tokensel.vlm.load import Vlm
from tokensel.vlm.reduce import reduce

__all__ = ["LEARNERS", "DiffPruneLearner", "Learner", "VisionSelectorLearner", "train_answers"]

_STATISTICS = 8  # batches from which mean and standard deviation of the features are measured


class Learner(nn.Module, ABC):
    """A scorer with what else its training needs.

    Attributes:
        scorer: the model that is saved.
    """

    scorer: Any  # an AnsweredModel; torch's modules would hide its methods from a type checker

    @abstractmethod
    def visual(
        self, encoded: Encoded, step: int, config: AnswersConfig
    ) -> tuple[Float[Tensor, "packed width"], Tensor | float]:
        """Embeddings of a batch's packed tokens, changed by their weights, and what is added to the loss."""

    def prepare(self, vlm: Vlm, data: list[Questions], config: AnswersConfig) -> None:
        """What is done once, before the first step."""


class DiffPruneLearner(Learner):
    """Noise takes the place of what a token's weight does not cover; a denoiser reads the mixture."""

    def __init__(self, config: Any):
        """
        Args:
            config: of the vision-language model.
        """
        super().__init__()
        width = family_of(config).width(config)
        self.scorer = DiffPrune(DiffPruneConfig(width=width))
        self.denoiser = Denoiser(width)

    def prepare(self, vlm: Vlm, data: list[Questions], config: AnswersConfig) -> None:
        """Measure the statistics of the features; never of more batches than will be trained on."""
        steps = range(min(config.steps, _STATISTICS))
        statistics = Statistics.of(draw_questions(vlm, data, config, step)[0].features for step in steps)
        self.scorer.trunk.standardise(statistics.mean, statistics.std)
        self.denoiser.standardise(statistics.mean, statistics.std)

    def visual(
        self, encoded: Encoded, step: int, config: AnswersConfig
    ) -> tuple[Float[Tensor, "packed width"], Tensor | float]:
        """The projected tokens after noise and denoiser; nothing is added to the loss."""
        layout, features = encoded.layout, encoded.features.tokens
        source = layout.source[layout.cell].to(features.device)
        scores = self.scorer.scores(features).flatten()[source]
        # of tokens on the letterbox, which the model never reads, nothing is left
        weight = torch.zeros(features.shape[:2], device=features.device).flatten()
        cells = image_weights(encoded, scores, step, config, _tau(step, config))
        weight = weight.index_copy(0, source, cells)
        noise = torch.randn(features.shape, generator=generator(config.seed, "noise", step))
        read = self.denoiser(features, weight.view(features.shape[:2]), noise.to(features.device))
        kept = torch.ones_like(layout.cell)
        return encoded.family.project(encoded, kept, read), 0.0


class VisionSelectorLearner(Learner):
    """Projected tokens are multiplied by their weights, which are driven towards a hard choice."""

    def __init__(self, config: Any):
        """
        Args:
            config: of the vision-language model.
        """
        super().__init__()
        self.scorer = VisionSelector(VisionSelectorConfig(width=config.text_config.hidden_size))

    def visual(
        self, encoded: Encoded, step: int, config: AnswersConfig
    ) -> tuple[Float[Tensor, "packed width"], Tensor | float]:
        """The weighed tokens, and the weighted cross entropy between soft and hard choice."""
        layout, projected = encoded.layout, replace(encoded.features, tokens=encoded.projected())
        rows, slot, images = encoded.by_image(projected)
        scores = self.scorer.scores(images.tokens, images.valid)[rows, slot]
        weight = image_weights(encoded, scores, step, config, 1.0)
        hard = image_weights(encoded, scores.detach(), step, config, 0.0)
        share = step / max(1, config.steps - 1)
        strength = config.hard_start + (config.hard_end - config.hard_start) * share
        embeds = encoded.family.project(encoded, torch.ones_like(layout.cell))
        cell = layout.cell.nonzero()[:, 0].to(embeds.device)
        # newlines keep the weight 1
        weights = torch.ones(len(embeds), device=embeds.device).index_copy(0, cell, weight.to(embeds.device))
        return embeds * weights[:, None].to(embeds.dtype), strength * binary_cross_entropy(weight, hard)


LEARNERS: dict[str, type[Learner]] = {
    "diffprune": DiffPruneLearner,
    "visionselector": VisionSelectorLearner,
}


def image_weights(
    encoded: Encoded, scores: Float[Tensor, "cells"], step: int, config: AnswersConfig, tau: float
) -> Float[Tensor, "cells"]:
    """Weights of the cells in packed order, which sum to the step's budget in each image.

    Args:
        encoded: the batch.
        scores: of its cells.
        step: its number, which decides the budget where that is drawn.
        config: all choices.
        tau: temperature of the soft choice; 0 for the hard one.
    """
    keep = drawn_budget(step, config.seed, config.keep, config.keep_most)
    lengths = encoded.layout.slots[2].tolist()
    parts = [part[None] for part in scores.split(lengths)]
    if tau:
        return torch.cat([soft_top_k(part, keep, tau)[0] for part in parts])
    return torch.cat([(part > threshold(part, keep)).float()[0] for part in parts])


def _tau(step: int, config: AnswersConfig) -> float:
    """Half a cosine from the first temperature to the last."""
    falling = (1 + math.cos(math.pi * step / max(1, config.steps - 1))) / 2
    return config.tau_end + (config.tau_start - config.tau_end) * falling


def train_answers(config: AnswersConfig, vlm: Vlm | None = None) -> tuple[AnsweredModel, list[Record]]:
    """Train a scorer; continues an earlier run in ``config.out`` that was interrupted.

    Killed at any moment, the same call ends at the weights of an undisturbed run: each step's questions and
    noise depend on the seed and the step's number alone.

    Args:
        config: all choices.
        vlm: instead of ``config.model``, one in memory; its weights are frozen here.

    Returns:
        The scorer's model, and one history record per step.

    Raises:
        TokenselError: no model or data, a model of another family, a step without an image, a checkpoint of
            another training, a full disk.
    """
    vlm, data = load_frozen(config, vlm)
    model, shape = vlm.model, vlm.model.config
    if not family_of(shape).tiled:
        raise TokenselError(
            f"{config.model} is a {shape.model_type}: give a LLaVA-NeXT or LLaVA-OneVision, whose projector "
            "takes changed tokens"
        )
    learner = seeded(lambda: LEARNERS[config.scorer](shape), config.seed).to(model.device)
    decoder_of(model)  # raises before the first batch if the language model is not known

    def losses(step: int) -> dict[str, Tensor | float]:
        encoded, tokens, lengths = draw_questions(vlm, data, config, step)
        if not bool(encoded.layout.cell.any()):
            raise TokenselError(f"no question of step {step + 1} has an image: give benchmarks with images")
        visual, more = learner.visual(encoded, step, config)
        forced = force(model, reduce(encoded).with_visual(visual), tokens, lengths)
        accuracy = answer_loss(forced_logits(model, forced), forced.labels)
        return {"loss": accuracy + more, "accuracy_loss": accuracy}

    records = run_steps(
        config,
        learner,
        training_identity(config, model, data),
        losses,
        lambda: learner.prepare(vlm, data, config),
    )
    scorer = learner.scorer.cpu()
    scorer.config.update(
        training_facts(config, data, records, "accuracy_loss")
        | {"keep": config.keep, "keep_most": config.keep_most, "encoder": vlm.name}
        | {"feature_layer": shape.vision_feature_layer}
        | {"drop_cls": shape.vision_feature_select_strategy == "default"}
    )
    if config.out:
        scorer.save_pretrained(Path(config.out) / config.scorer)
    return scorer, records
