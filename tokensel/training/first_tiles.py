"""What a training measures on its first tiles: statistics, the unit of the error, at its end thresholds."""

from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import torch

from tokensel.budget import measure_thresholds
from tokensel.data.features import Features
from tokensel.data.loader import FeatureLoader
from tokensel.model.gates import threshold
from tokensel.model.gumbel import KEEP
from tokensel.model.selector import TokenSelector
from tokensel.training.autoencoder import Autoencoder, Statistics
from tokensel.training.checkpoint import Progress
from tokensel.training.config import TrainConfig
from tokensel.training.metrics import Metric


def first_batches(loader: FeatureLoader, config: TrainConfig) -> Iterator[Features]:
    """The batches on which statistics are measured, the same whole ones in every process.

    Never more of them than will be trained on.
    """
    count = min(config.steps, -(-config.statistics_tiles // config.batch_size))
    with closing(loader.batches(0, config.batch_size, slice(0, config.batch_size), config.seed)) as batches:
        yield from islice(batches, count)


def measure_statistics(
    model: Autoencoder, loader: FeatureLoader, config: TrainConfig, metric: Metric
) -> Progress:
    """Step 0: measure the features' statistics on the first tiles and set them in the models.

    The scale is measured where errors are, behind the metric.
    """
    device = model.selector.device
    with torch.no_grad():
        statistics = Statistics.of(first_batches(loader, config), lambda tokens: metric(tokens.to(device)))
    model.standardise(statistics.mean, statistics.std)
    return Progress(0, statistics.scale, loader.identity, loader.state())


@torch.no_grad()
def calibrate(selector: TokenSelector, loader: FeatureLoader, config: TrainConfig) -> None:
    """Measure the selector's thresholds on the tiles of the statistics, and give its scores their zero.

    Those above 0, which it keeps without a budget, become p of all, or the middle of budgets that were drawn.
    The paper's gate fixes the zero itself; under a gate that divides a budget nothing else does.
    """
    batches = (batch.to("cpu") for batch in first_batches(loader, config))
    parts = [(selector.scores(batch.tokens, batch.valid, batch.grid), batch.valid) for batch in batches]
    scores = torch.cat([s.flatten() if v is None else s[v] for s, v in parts])
    if config.gate != "gumbel":
        zero = threshold(scores[None], (config.p + (config.p_most or config.p)) / 2)
        selector.head.bias[KEEP] -= zero
        scores = scores - zero
    selector.config.thresholds = measure_thresholds(scores)
