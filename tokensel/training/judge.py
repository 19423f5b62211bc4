"""Which of two subsets is better? The one from which the rest can be reconstructed more closely (Eq. 1).

R in Eq. (1) is the optimal reconstruction for the subset, so each policy and each budget gets a reconstructor
of its own: one that was trained on other masks would judge their likeness to its own, not their content.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from tokensel.data.features import Features
from tokensel.data.loader import rows_of_step
from tokensel.model.objective import distance
from tokensel.training.autoencoder import MaskedAutoencoder, Statistics
from tokensel.training.config import TrainConfig
from tokensel.training.optim import adamw, autocast, descend, seeded
from tokensel.utils.errors import needs

with needs("train"):
    from accelerate import Accelerator

Scorer = Callable[[Features], Tensor]


@torch.no_grad()
def policy_scores(features: Features, scorer: Scorer, batch_size: int = 256) -> Float[Tensor, "tiles tokens"]:
    """A policy's scores of all tiles, some at a time; :func:`~tokensel.budget.top_fraction` makes masks of them.

    Raises:
        TokenselError: features that the scorer cannot read.
    """
    starts = range(0, len(features), batch_size)
    return torch.cat([scorer(features[slice(start, start + batch_size)]) for start in starts])


def train_reconstructor(
    features: Features,
    masks: Bool[Tensor, "tiles tokens"],
    config: TrainConfig | None = None,
    initial: MaskedAutoencoder | None = None,
) -> MaskedAutoencoder:
    """Train only a reconstructor, and the masked embedding it reads, for one policy at one budget.

    Args:
        features: training tiles, in memory.
        masks: what the policy keeps of each tile, the same in every epoch; True = kept.
        config: of its fields those on model, optimisation and running count; 300 steps at a rate of 1e-3 if
            not given: more than in joint training, since no sampling disturbs the gradient here.
        initial: start from a copy of this one's weights instead of from new ones, which saves steps.
    """
    config = config or TrainConfig(steps=300, lr=1e-3, progress=False)
    accelerator = Accelerator(cpu=features.tokens.device.type == "cpu")
    model = seeded(lambda: MaskedAutoencoder.new(features.tokens.shape[-1], *config.shape), config.seed)
    statistics = Statistics.of([features[: config.statistics_tiles]])
    if initial is None:
        model.standardise(statistics.center, statistics.spread)
    else:
        model.load_state_dict(initial.state_dict())
    model.to(features.tokens.device)
    optimizer = adamw(model, config)
    for step in tqdm(range(config.steps), desc="reconstructor", unit="step", disable=not config.progress):
        rows = rows_of_step(step, config.batch_size, len(features), config.seed).to(features.tokens.device)
        batch = features[rows]
        with autocast(accelerator, config):
            reconstructed = model(batch.tokens, masks[rows], batch.valid)
        loss = distance(reconstructed, batch.tokens, batch.valid).mean() / statistics.scale
        descend(accelerator, model, optimizer, loss, step, config)
    return model.eval()


@torch.no_grad()
def reconstruction_error(
    model: MaskedAutoencoder, features: Features, masks: Bool[Tensor, "tiles tokens"], batch_size: int = 256
) -> Float[Tensor, "tiles"]:
    """||R(F^pr) - F||_2 / ||F||_2 of each tile, all tokens counted: the dist of Eq. (1), relative.

    Args:
        model: from :func:`train_reconstructor` for this policy and budget.
        features: tiles it was not trained on.
        masks: what the policy keeps of each; True = kept.

    Raises:
        TokenselError: features of another width.
    """
    errors = []
    for start in range(0, len(features), batch_size):
        part = features[slice(start, start + batch_size)]
        reconstructed = model(part.tokens, masks[start : start + batch_size], part.valid)
        norm = distance(torch.zeros_like(part.tokens), part.tokens, part.valid)
        errors.append(distance(reconstructed, part.tokens, part.valid) / norm.clamp(min=1e-12))
    return torch.cat(errors)
