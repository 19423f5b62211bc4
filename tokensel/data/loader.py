"""Which features come at which step: the same on one process or many, at the first start or after a kill.

Step ``s`` trains on the samples ``s*batch .. (s+1)*batch - 1``. Sample ``g`` is row ``g`` of an endless walk:
the rows of epoch 0 in an order drawn from (seed, 0), then those of epoch 1, and so on; a stream is walked in
its own order. A process takes its slice of each batch, so nothing depends on how many there are, and any step
can be entered without replaying those before it.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, islice
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from tokensel.data.encoders import Tiles, VisionEncoder
from tokensel.data.features import Features
from tokensel.data.images import ImageSource
from tokensel.utils.errors import TokenselError
from tokensel.utils.seeds import derived_seed, generator


@lru_cache(maxsize=4)
def epoch_order(length: int, seed: int, epoch: int) -> Int[Tensor, "length"]:
    """The order of the rows in one epoch."""
    return torch.randperm(length, generator=generator(seed, "order", epoch))


def rows_of_step(step: int, batch_size: int, length: int, seed: int) -> Int[Tensor, "batch"]:
    """The rows that the whole batch of a step is made of."""
    samples = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs = samples // length
    rows = torch.empty_like(samples)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = epoch_order(length, seed, epoch)[samples[here] % length]
    return rows


@runtime_checkable
class Feed(Protocol):
    """Where a training takes its features from.

    Attributes:
        name: of the data, for the model card.
        identity: tells whether a later run reads the same data.
        width: channels of a token.
        skipped: names of the pictures that could not be read so far.
        encoder: what made the features, where that is known.
    """

    name: str
    identity: str
    width: int
    skipped: list[str]
    encoder: VisionEncoder | None

    def batches(self, start: int, batch_size: int, mine: slice, seed: int) -> Iterator[Features]:
        """Batches of this process from step ``start`` on, without end; ``mine`` is its slice of each."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class StoredFeed:
    """Features that are there already: a :class:`Features` in memory, or a cache on disk."""

    def __init__(self, features: Any, name: str = "features in memory", encoder: VisionEncoder | None = None):
        if not len(features):
            raise TokenselError(f"{name}: holds no tiles; give at least one")
        self.features, self.name, self.encoder = features, name, encoder
        self.width = features.tokens.shape[-1] if isinstance(features, Features) else features.width
        self.identity = memory_identity(features) if isinstance(features, Features) else features.identity
        self.skipped = list(getattr(features, "skipped", []))

    def batches(self, start: int, batch_size: int, mine: slice, seed: int) -> Iterator[Features]:
        for step in count(start):
            rows = rows_of_step(step, batch_size, len(self.features), seed)[mine]
            batch = self.features[rows]
            batch.keys = rows if batch.keys is None else batch.keys
            yield batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class ImageFeed:
    """Pictures that the frozen encoder turns into features as they come.

    One picture is one sample is one tile; with ``tiles="anyres"`` one of its tiles, drawn from the seed.
    A picture that cannot be read takes part as a row without valid tokens, which no loss counts.
    """

    def __init__(self, source: ImageSource, encoder: VisionEncoder, tiles: Tiles = "whole", workers: int = 2):
        self.source, self.encoder, self.tiles, self.workers = source, encoder, tiles, workers
        self.name, self.width, self.skipped = source.name, encoder.width, source.skipped
        self.identity = f"{source.name} {source.length} {tiles} {encoder.fingerprint()}"
        self.stream_length: int | None = None  # of a stream, known once its end was met

    def batches(self, start: int, batch_size: int, mine: slice, seed: int) -> Iterator[Features]:
        for pixels, real, keys in ahead(lambda: self._pixels(start, batch_size, mine, seed)):
            features = self.encoder.features(pixels)
            valid = (
                None
                if real.all()
                else real.to(features.tokens.device)[:, None].expand(features.tokens.shape[:2])
            )
            yield Features(features.tokens.float(), valid, keys=keys)

    def state(self) -> dict[str, Any]:
        return {"stream_length": self.stream_length, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.stream_length = state["stream_length"]
        self.skipped[:] = state["skipped"]

    def _pixels(
        self, start: int, batch_size: int, mine: slice, seed: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = self.encoder.size
        stream = self._endless(start * batch_size) if self.source.length is None else None
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            for step in count(start):
                samples = range(step * batch_size, (step + 1) * batch_size)[mine]
                if stream is None:
                    rows = rows_of_step(step, batch_size, self.source.length, seed)[mine].tolist()
                    content = [self.source.row(row) for row in rows]
                else:
                    rows = list(samples)
                    content = list(islice(stream, batch_size))[mine]
                picks = [derived_seed(seed, "tile", sample) for sample in samples]
                tiles = list(pool.map(self._tile, content, picks))
                real = torch.tensor([tile is not None for tile in tiles])
                blank = torch.zeros(3, size, size)
                yield (
                    torch.stack([blank if tile is None else tile for tile in tiles]),
                    real,
                    torch.tensor(rows),
                )

    def _tile(self, row: tuple[str, Any], pick: int) -> Tensor | None:
        image = self.source.open(*row)
        if image is None:
            return None
        tiles = self.encoder.preprocess([image], self.tiles)
        return tiles[pick % len(tiles)]

    def _endless(self, start: int) -> Iterator[tuple[str, Any]]:
        """Rows of the stream from sample ``start`` on, beginning anew whenever it ends."""
        first = start % self.stream_length if self.stream_length else start
        while True:
            met = first
            for row in self.source.stream(first):
                met += 1
                yield row
            if met == 0:
                raise TokenselError(f"{self.name}: no images in it; give a dataset that has some")
            self.stream_length, first = met, 0


def memory_identity(features: Features) -> str:
    """Tells features in memory apart from others: their shape and a digest of their values."""
    tokens = features.tokens.detach().cpu().contiguous()
    digest = hashlib.blake2b(tokens.view(torch.uint8).numpy(), digest_size=8).hexdigest()
    return f"{tuple(tokens.shape)} {digest}"


def ahead(make: Callable[[], Iterator[Any]], depth: int = 2) -> Iterator[Any]:
    """The items of an iterator, prepared by a thread that stays up to ``depth`` of them ahead.

    What the iterator raises is raised here, in its turn; closing this generator ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item: tuple[str, Any]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        items = make()
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:  # handed to the reader, whatever it is
            put(("error", error))
        finally:
            items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
