"""Features kept on disk, so that the encoder need see each picture only once."""

import json
from bisect import bisect_right
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from tokensel.data.encoders import Tiles, VisionEncoder
from tokensel.data.features import Features
from tokensel.data.images import ImageSource
from tokensel.utils.errors import CheckpointError, TokenselError
from tokensel.utils.files import save_tensors, write_json

IMAGES_A_SHARD = 256
TILES_AN_IMAGE = 1 << 16  # keys count images in steps of this, so that tile t of image i has a key of its own


class FeatureCache:
    """Rows of features in safetensors shards, read as they are asked for; ``cache[rows]`` gives Features.

    Attributes:
        width, tokens: shape of a tile's features.
        identity: the encoder and pictures they came from.
        skipped: names of the pictures that could not be read.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = read_index(folder)
        if index is None:
            raise TokenselError(f"{folder}: no feature cache (no index.json); build it first")
        self.identity, self.skipped = index["identity"], index["skipped"]
        self.tokens, self.width = index["tokens"], index["width"]
        self.ends: list[int] = []  # rows up to the end of each shard
        self.shards = []
        for shard in index["shards"]:
            try:
                self.shards.append(safe_open(folder / shard["file"], framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{folder / shard['file']}: cut short or gone ({error}); delete the cache {folder}"
                ) from None
            self.ends.append((self.ends[-1] if self.ends else 0) + shard["tiles"])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, rows: Tensor) -> Features:
        places = []
        for row in rows.tolist():
            shard = bisect_right(self.ends, row)
            places.append((shard, row - (self.ends[shard - 1] if shard else 0)))
        tokens = [self.shards[shard].get_slice("tokens")[row] for shard, row in places]
        keys = [self.shards[shard].get_slice("keys")[row : row + 1] for shard, row in places]
        return Features(torch.stack(tokens).float(), keys=torch.cat(keys))


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The cache's table of contents, or None while there is none."""
    path = Path(folder) / "index.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def build_cache(
    folder: str | Path,
    source: ImageSource,
    encoder: VisionEncoder,
    tiles: Tiles = "whole",
    batch_size: int = 32,
    progress: bool = True,
) -> FeatureCache:
    """Encode every picture once, all its tiles, into ``folder``; a cache that is there is checked and used.

    Stopped at any moment, the same call goes on with the next shard. Features keep the encoder's dtype.

    Raises:
        TokenselError: the folder holds features of another encoder or of other pictures, no picture could
            be read, or the disk is full.
    """
    folder = Path(folder)
    identity = f"{source.name} {source.length} {tiles} {encoder.fingerprint()}"
    index = read_index(folder)
    if index is not None:
        _same(folder, index["identity"], identity)
        return FeatureCache(folder)
    shards: list[dict[str, Any]] = []
    skipped: list[str] = []
    rows = source.stream()
    with tqdm(total=source.length, unit="image", desc="features", disable=not progress) as bar:
        while content := list(islice(rows, IMAGES_A_SHARD)):
            path = folder / f"features-{len(shards):05d}.safetensors"
            header = _header(path)
            if header is None:
                first = len(shards) * IMAGES_A_SHARD
                header = _write_shard(path, content, first, source, encoder, tiles, batch_size, identity)
            _same(path, header.get("identity"), identity)
            shards.append({"file": path.name, "tiles": int(header["tiles"])})
            skipped += json.loads(header["skipped"])
            bar.update(len(content))
    if not sum(shard["tiles"] for shard in shards):
        raise TokenselError(f"{source.name}: none of its images can be read; give others")
    index = {"identity": identity, "images": source.name, "encoder": encoder.name, "tokens": encoder.tokens}
    write_json(folder / "index.json", index | {"width": encoder.width, "shards": shards, "skipped": skipped})
    return FeatureCache(folder)


def _write_shard(
    path: Path,
    content: list[tuple[str, Any]],
    first: int,
    source: ImageSource,
    encoder: VisionEncoder,
    tiles: Tiles,
    batch_size: int,
    identity: str,
) -> dict[str, str]:
    """Encode the pictures of one shard, the first of them picture ``first``; returns the file's header."""
    tokens, keys, skipped = [], [], []
    for start in range(0, len(content), batch_size):
        pixels = []
        for number, (name, raw) in enumerate(content[start : start + batch_size], first + start):
            image = source.open(name, raw)
            if image is None:
                skipped.append(name)
                continue
            pixels.append(encoder.preprocess([image], tiles))
            keys += [number * TILES_AN_IMAGE + tile for tile in range(len(pixels[-1]))]
        if pixels:
            tokens += [encoder.features(part).tokens.cpu() for part in torch.cat(pixels).split(batch_size)]
    empty = torch.zeros(0, encoder.tokens, encoder.width)
    header = {"identity": identity, "tiles": str(len(keys)), "skipped": json.dumps(skipped)}
    together = torch.cat(tokens) if tokens else empty
    save_tensors(path, {"tokens": together, "keys": torch.tensor(keys, dtype=torch.long)}, header)
    return header


def _header(path: Path) -> dict[str, str] | None:
    """What a shard says of itself; None where there is none (shards are moved into place when whole)."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as shard:
            return dict(shard.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short ({error}); delete it and it will be written again") from None


def _same(path: Path, found: str | None, wanted: str) -> None:
    if found != wanted:
        raise TokenselError(
            f"{path}: holds features of [{found}], not of [{wanted}]; give another cache folder or delete it"
        )
