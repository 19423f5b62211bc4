"""Features stored on disk, so that each image is encoded only once."""

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
from tokensel.data.image_sources import ImageSource
from tokensel.utils.errors import CheckpointError, TokenselError
from tokensel.utils.files import save_tensors, write_json

IMAGES_A_SHARD = 256
TILES_AN_IMAGE = 1 << 16  # keys count images in steps of this, so that tile t of image i has a key of its own


class FeatureCache:
    """Rows of features in safetensors shards, read on demand; ``cache[rows]`` gives Features on the CPU.

    Attributes:
        width, tokens: shape of a tile's features.
        identity: the encoder and images they came from, see :func:`data_identity`.
        skipped: names of the images that could not be read.
    """

    def __init__(self, folder: str | Path):
        """
        Raises:
            TokenselError: there is no cache in the folder, or a file of it is missing or cut short.
        """
        folder = Path(folder)
        index = read_index(folder)
        if index is None:
            raise TokenselError(f"{folder}: no feature cache (no index.json); build it first")
        self.identity, self.skipped = index["identity"], index["skipped"]
        self.tokens, self.width = index["tokens"], index["width"]
        self.ends: list[int] = []  # number of rows up to the end of each shard
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
        positions = []  # shard, and row within the shard
        for row in rows.tolist():
            shard = bisect_right(self.ends, row)
            positions.append((shard, row - (self.ends[shard - 1] if shard else 0)))
        tokens = [self.shards[shard].get_slice("tokens")[row] for shard, row in positions]
        keys = [self.shards[shard].get_slice("keys")[row : row + 1] for shard, row in positions]
        return Features(torch.stack(tokens).float(), keys=torch.cat(keys))


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The cache's table of contents; ``None`` until the cache is complete."""
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
    """Encode all tiles of every image once, into ``folder``; an existing cache is checked and used.

    Interrupted at any moment, the same call continues with the next shard. Features keep the encoder's dtype.

    Raises:
        TokenselError: the folder holds features of another encoder or of other images, no image could be
            read, or the disk is full.
    """
    if encoder.ragged:
        raise TokenselError(
            f"{encoder.name} makes more tokens of larger images, and a cache holds tiles of one size: leave "
            "cache out"
        )
    folder = Path(folder)
    identity = data_identity(source, tiles, encoder)
    index = read_index(folder)
    if index is not None:
        _check_identity(folder, index["identity"], identity)
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
            _check_identity(path, header.get("identity"), identity)
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
    """Encode the images of one shard, whose first has the number ``first``; returns the file's header."""
    tokens, keys, skipped = [], [], []
    for start in range(0, len(content), batch_size):
        pixels: list[Any] = []  # a tile each
        for number, (name, raw) in enumerate(content[start : start + batch_size], first + start):
            image = source.open(name, raw)
            if image is None:
                skipped.append(name)
                continue
            cut = encoder.preprocess([image], tiles)
            pixels += list(cut)
            keys += [number * TILES_AN_IMAGE + tile for tile in range(len(cut))]
        for chunk in range(0, len(pixels), batch_size):
            part = encoder.stack(pixels[chunk : chunk + batch_size])
            tokens.append(encoder.features(part).tokens.cpu())
    empty = torch.zeros(0, encoder.tokens, encoder.width)
    header = {"identity": identity, "tiles": str(len(keys)), "skipped": json.dumps(skipped)}
    all_tokens = torch.cat(tokens) if tokens else empty
    save_tensors(path, {"tokens": all_tokens, "keys": torch.tensor(keys, dtype=torch.long)}, header)
    return header


def _header(path: Path) -> dict[str, str] | None:
    """The header of a shard; ``None`` where there is no shard yet: each is moved into place when whole."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as shard:
            return dict(shard.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short ({error}); delete it to have it written again") from None


def _check_identity(path: Path, stored: str | None, expected: str) -> None:
    if stored != expected:
        raise TokenselError(
            f"{path}: holds features of [{stored}], not of [{expected}]; "
            "give another cache folder or delete it"
        )


def data_identity(source: ImageSource, tiles: Tiles, encoder: VisionEncoder) -> str:
    """Equal for the same images, cut into the same tiles and encoded by the same encoder; one line."""
    return f"{source.identity()}, {tiles} tiles, encoder {encoder.fingerprint()}"
