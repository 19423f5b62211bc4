"""Which of two subsets is better? The one from which the rest can be reconstructed more closely (Eq. 1).

R in Eq. (1) is the optimal reconstruction for the subset, so each policy and each budget gets a reconstructor
of its own: one trained on other masks would measure how similar the masks are to those, not their content.
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
from tokensel.training.optim import adamw, optimizer_step, seeded, use_bf16
from tokensel.training.processes import Processes

Scorer = Callable[[Features], Tensor]


@torch.no_grad()
def policy_scores(features: Features, scorer: Scorer, batch_size: int = 256) -> Float[Tensor, "tiles tokens"]:
    """A policy's scores of all tiles, in batches; :func:`~tokensel.budget.top_fraction` makes masks of them.

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
        features: training tiles, in memory; training runs on their device.
        masks: what the policy keeps of each tile, the same in every epoch, on the same device; True = kept.
        config: its fields on model, optimisation and precision are used; by default 300 steps at a learning
            rate of 1e-3: higher than in joint training, as no sampling disturbs the gradient here.
        initial: start from a copy of this one's weights instead of from new ones, which saves steps.

    Returns:
        The trained model, on the device of the features.
    """
    config = config or TrainConfig(steps=300, lr=1e-3, progress=False)
    device = features.tokens.device
    model = seeded(lambda: MaskedAutoencoder.new(features.tokens.shape[-1], *config.shape), config.seed)
    statistics = Statistics.of([features[: config.statistics_tiles]])
    if initial is None:
        model.standardise(statistics.mean, statistics.std)
    else:
        model.load_state_dict(initial.state_dict())
    model.to(device)
    optimizer = adamw(model, config)
    for step in tqdm(range(config.steps), desc="reconstructor", unit="step", disable=not config.progress):
        rows = rows_of_step(step, config.batch_size, len(features), config.seed).to(device)
        batch = features[rows]
        with Processes(device).autocast(use_bf16(device, config)):
            reconstructed = model(batch.tokens, masks[rows], batch.valid)
        loss = distance(reconstructed, batch.tokens, batch.valid).mean() / statistics.scale
        optimizer_step(model, optimizer, loss, step, config)
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
