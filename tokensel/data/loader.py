"""Which features come at which step: the same on one process or many, at the first start or after a kill.

Step ``s`` trains on the samples ``s*batch .. (s+1)*batch - 1``. Sample ``g`` is row ``g`` of an endless
sequence: the rows of epoch 0 in an order drawn from (seed, 0), then those of epoch 1, and so on; a stream is
read in its own order. A process takes its slice of each batch, so nothing depends on how many there are, and
any step can be entered without replaying those before it.

Images are decoded by threads of our own. ``torch.utils.data.DataLoader`` would need worker processes to do
the same (its in-process mode loads nothing ahead), to which the sources would have to be sent, and which
would have to send back what they know of skipped images and of the length of a stream.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from tokensel.data.encoders import Tiles, VisionEncoder
from tokensel.data.feature_cache import FeatureCache, data_identity
from tokensel.data.features import Features
from tokensel.data.image_sources import ImageSource
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import derived_seed, generator

Item = TypeVar("Item")
_END = object()


@lru_cache(maxsize=4)
def epoch_order(length: int, seed: int, epoch: int) -> Int[Tensor, "length"]:
    """The order of the rows in one epoch."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


def rows_of_step(step: int, batch_size: int, length: int, seed: int) -> Int[Tensor, "batch"]:
    """The rows that the whole batch of a step is made of; on the host."""
    samples = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = samples // length
    rows = torch.empty_like(samples)
    for epoch in epochs.unique().tolist():  # a batch may span epochs
        in_epoch = epochs == epoch
        rows[in_epoch] = epoch_order(length, seed, epoch)[samples[in_epoch] % length]
    return rows


@runtime_checkable
class FeatureLoader(Protocol):
    """Where a training takes its features from.

    Attributes:
        name: of the data, for the model card.
        identity: equal for two runs if and only if they read the same data.
        width: channels of a token.
        skipped: names of the images that could not be read so far.
        encoder: what made the features, where that is known.
    """

    name: str
    identity: str
    width: int
    skipped: list[str]

    @property
    def encoder(self) -> VisionEncoder | None: ...

    def batches(
        self, start: int, batch_size: int, local_rows: slice, seed: int
    ) -> Generator[Features, None, None]:
        """Batches from step ``start`` on, without end; of each only this process's slice ``local_rows``."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the step, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        ...


class StoredFeatureLoader:
    """Serves features that exist already: :class:`Features` in memory, or a cache on disk."""

    def __init__(
        self,
        features: Features | FeatureCache,
        name: str = "features in memory",
        encoder: VisionEncoder | None = None,
    ):
        """
        Raises:
            TokenselError: there are no tiles.
        """
        if not len(features):
            raise TokenselError(f"{name}: holds no tiles; give at least one")
        self.features, self.name, self.encoder = features, name, encoder
        self.skipped: list[str] = []
        if isinstance(features, Features):
            self.width, self.identity = features.tokens.shape[-1], features_identity(features)
        else:
            self.width, self.identity = features.width, features.identity
            self.skipped += features.skipped

    def batches(
        self, start: int, batch_size: int, local_rows: slice, seed: int
    ) -> Generator[Features, None, None]:
        for step in count(start):
            rows = rows_of_step(step, batch_size, len(self.features), seed)[local_rows]
            batch = self.features[rows]
            batch.keys = rows if batch.keys is None else batch.keys
            yield batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class ImageFeatureLoader:
    """Serves images, turned into features by the frozen encoder as they are needed.

    One image is one sample is one tile; with ``tiles="anyres"`` one of its tiles, drawn from the seed. An
    image that cannot be read takes part as a row without valid tokens, which no loss counts.
    """

    def __init__(self, source: ImageSource, encoder: VisionEncoder, tiles: Tiles = "whole", workers: int = 2):
        self.source, self.encoder, self.workers = source, encoder, workers
        self.tiles: Tiles = tiles
        self.name, self.width, self.skipped = source.name, encoder.width, source.skipped
        self.identity = data_identity(source, tiles, encoder)
        self.stream_length: int | None = None  # of a stream, known once its end was reached

    def batches(
        self, start: int, batch_size: int, local_rows: slice, seed: int
    ) -> Generator[Features, None, None]:
        for pixels, readable, keys in loaded_ahead(self._pixels(start, batch_size, local_rows, seed)):
            features = self.encoder.features(pixels)
            valid = features.valid
            if not readable.all():  # [batch] -> [batch, tokens]
                rows = readable.to(features.tokens.device)[:, None].expand(features.tokens.shape[:2])
                valid = rows if valid is None else rows & valid
            yield Features(features.tokens.float(), valid, keys=keys, grid=features.grid)

    def state(self) -> dict[str, Any]:
        return {"stream_length": self.stream_length, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.stream_length = state["stream_length"]
        self.skipped[:] = state["skipped"]

    def _pixels(
        self, start: int, batch_size: int, local_rows: slice, seed: int
    ) -> Generator[tuple[Any, Tensor, Tensor], None, None]:
        """Pixels of each step's images, which of them could be read, and their rows; on the host."""
        length = self.source.length
        stream = self._endless_stream(start * batch_size)
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for step in count(start):
                samples = range(step * batch_size, (step + 1) * batch_size)[local_rows]
                if length is None:
                    rows, content = list(samples), list(islice(stream, batch_size))[local_rows]
                else:
                    rows = rows_of_step(step, batch_size, length, seed)[local_rows].tolist()
                    content = [self.source.row(row) for row in rows]
                picks = [derived_seed(seed, "tile", sample) for sample in samples]
                tiles = list(pool.map(self._tile, content, picks))
                readable = torch.tensor([tile is not None for tile in tiles])
                yield self.encoder.stack(tiles), readable, torch.tensor(rows)

    def _tile(self, row: tuple[str, Any], pick: int) -> Any:
        image = self.source.open(*row)
        if image is None:
            return None
        tiles = self.encoder.preprocess([image], self.tiles)
        return tiles[pick % len(tiles)]

    def _endless_stream(self, start: int) -> Iterator[tuple[str, Any]]:
        """Rows of the stream from sample ``start`` on, restarted whenever it ends."""
        first = start % self.stream_length if self.stream_length else start
        while True:
            read = first
            for row in self.source.stream(first):
                read += 1
                yield row
            if read == 0:
                raise TokenselError(f"{self.name}: no images in it; give a dataset that has some")
            self.stream_length, first = read, 0


def features_identity(features: Features) -> str:
    """Tells features in memory apart from others: their shape and a digest of their values and padding."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (features.tokens, features.valid):
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"features of shape {tuple(features.tokens.shape)} {digest.hexdigest()}"


def loaded_ahead(items: Generator[Item, None, None], depth: int = 2) -> Generator[Item, None, None]:
    """The items of a generator, which a thread runs up to ``depth`` items ahead.

    What the generator raises is raised here, in its turn; closing this generator ends the thread.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            ahead = deque(pool.submit(next, items, _END) for _ in range(depth))
            while (item := ahead.popleft().result()) is not _END:
                ahead.append(pool.submit(next, items, _END))
                yield cast(Item, item)
        finally:
            pool.shutdown(
                cancel_futures=True
            )  # waits for the item in work: a running generator cannot be closed
            items.close()
