"""Where the images of a training come from: a folder, a dataset, a Hub id, a parquet file, a list."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokensel.data.images import ImageError, as_image
from tokensel.utils.errors import TokenselError, needs, reason

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}


@dataclass
class ImageSource:
    """Rows that can be opened as images, in a fixed order.

    Attributes:
        name: what to call it in a model card.
        rows: a sequence, or an iterable dataset when streaming.
        length: number of rows; ``None`` when streaming, where it is unknown.
        column: the dataset column that holds the image; empty for a folder or a list.
        skipped: names of the rows that could not be read, filled while reading.
    """

    name: str
    rows: Any
    length: int | None
    column: str = ""
    skipped: list[str] = field(default_factory=list)

    def row(self, index: int) -> tuple[str, Any]:
        """Name and undecoded content of one row; not for streams."""
        return self._unpack(index, self.rows[index])

    def stream(self, start: int = 0) -> Iterator[tuple[str, Any]]:
        """Name and undecoded content of each row from ``start`` on, once."""
        if self.length is not None:
            yield from (self.row(index) for index in range(start, self.length))
        else:
            rows = self.rows.skip(start) if start else self.rows
            yield from (self._unpack(index, row) for index, row in enumerate(rows, start))

    def open(self, name: str, content: Any) -> Image.Image | None:
        """The image as :func:`as_image` reads it; ``None`` if it cannot be read, then its name is noted.

        Raises:
            TokenselError: the row holds something else than an image.
        """
        try:
            return as_image(content, name)
        except ImageError:
            if name not in self.skipped:
                self.skipped.append(name)
            return None

    def identity(self) -> str:
        """Equal for the same images in the same order, wherever they are stored.

        It is computed from the number of images and a sample of up to 32 of them.
        """
        digest = hashlib.blake2b(digest_size=8)
        if self.length is None:
            sample = islice(self.stream(), 4)
        else:
            count = min(self.length, 32)
            sample = (self.row(i * self.length // count) for i in range(count))
        for name, content in sample:
            content_bytes = _encoded(content, name)
            digest.update(len(content_bytes).to_bytes(8, "little") + content_bytes)
        return f"{'a stream of' if self.length is None else self.length} images {digest.hexdigest()}"

    def _unpack(self, index: int, row: Any) -> tuple[str, Any]:
        content = row[self.column] if self.column else row
        path = content.get("path") if isinstance(content, dict) else content
        return str(path) if isinstance(path, (str, Path)) else f"row {index}", content


def _encoded(content: Any, name: str) -> bytes:
    """The file's bytes where there is a file, else the pixels; nothing where the image cannot be read."""
    try:
        if isinstance(content, dict):
            content = content.get("path") if content.get("bytes") is None else content["bytes"]
        if isinstance(content, bytes):
            return content
        if isinstance(content, (str, Path)):
            return Path(content).read_bytes()
        image = as_image(content, name)
        return repr(image.size).encode() + image.tobytes()
    except (ImageError, OSError, ValueError):
        return b""


def open_images(
    images: Any, column: str = "image", streaming: bool = False, limit: int | None = None
) -> ImageSource:
    """Find the images of a training.

    Args:
        images: a folder (with all folders in it), a parquet file, a folder written by ``save_to_disk``, a Hub
            id as ``name``, ``name:split`` or ``name:config:split``, a dataset, or a list of images, each
            whatever :func:`as_image` takes.
        column: where a dataset stores the image.
        streaming: read a Hub or parquet dataset row by row, without downloading all of it first.
        limit: take only the first so many rows.

    Raises:
        TokenselError: no images there, no such column or none of images, no such dataset, no connection to
            the Hub.
    """
    if limit is not None and limit < 1:
        raise TokenselError(f"limit is {limit}: give a count of at least 1, or leave it out")
    if isinstance(images, (str, Path)):
        name, rows = str(images), _find(str(images), streaming)
    else:
        name, rows = type(images).__name__, images
    if not type(rows).__module__.startswith("datasets."):
        is_list = isinstance(rows, Sequence) and not isinstance(rows, (bytes, bytearray, memoryview))
        if not is_list and not (isinstance(rows, np.ndarray) and rows.ndim in (3, 4)):
            raise TokenselError(f"images is of type {name}: give a folder, a dataset or a list of images")
        if not len(rows):
            raise TokenselError(f"{name}: no images in it; give a folder or a dataset that has some")
        return ImageSource(name, rows, min(len(rows), limit or len(rows)))
    with needs("train"):
        import datasets  # only here: importing it takes longer than all else, and folders do without

    if isinstance(rows, datasets.DatasetDict):
        raise TokenselError(f"{name}: has the splits {list(rows)}; name one, as in {name}:{next(iter(rows))}")
    columns, features = rows.column_names, rows.features
    if columns is not None and column not in columns:
        raise TokenselError(
            f"{name}: no column {column!r} among {columns}; name the one that holds the images"
        )
    if features is not None and not _may_hold_images(features[column]):
        raise TokenselError(
            f"{name}: its column {column!r} is of type {features[column]}; "
            "name a column of images, of encoded images (bytes) or of their paths"
        )
    if features is not None and isinstance(features[column], datasets.Image):
        # undecoded rows: images of other processes' slices need not be decoded, and a cut JPEG fails in our
        # code, which can name it, and not inside the dataset
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if isinstance(rows, datasets.IterableDataset):
        return ImageSource(name, rows.take(limit) if limit else rows, None, column)
    if not len(rows):
        raise TokenselError(f"{name}: no rows in it; give a dataset that has some")
    return ImageSource(name, rows, min(len(rows), limit or len(rows)), column)


def _may_hold_images(feature: Any) -> bool:
    """Whether a dataset's column of this type can hold images: as such, as bytes, as paths, or as both."""
    import datasets

    if isinstance(feature, dict):
        return bool(feature.keys() & {"bytes", "path"})
    if isinstance(feature, datasets.Value):
        return feature.dtype.removeprefix("large_") in ("binary", "string", "null")
    return isinstance(feature, datasets.Image)


def _find(name: str, streaming: bool) -> Any:
    """Rows behind a name: paths of a folder, or a dataset."""
    path = Path(name)
    if os.path.isdir(name):  # False, and no error, for a name that is no path
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
            with needs("train"):
                from datasets import load_from_disk

            return load_from_disk(name)
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if found:
            return found
        parquet = sorted(str(p) for p in path.rglob("*.parquet"))
        if not parquet:
            raise TokenselError(
                f"{name}: a folder without images (looked for {', '.join(sorted(SUFFIXES))} and parquet)"
            )
        return _load("parquet", split="train", data_files=parquet, streaming=streaming)
    if path.suffix == ".parquet" and os.path.exists(name):
        return _load("parquet", split="train", data_files=[name], streaming=streaming)
    if path.is_absolute() or os.path.exists(name):
        raise TokenselError(f"{name}: neither a folder of images nor a parquet file")
    hub, *rest = name.split(":")
    if len(rest) > 2:
        raise TokenselError(f"{name}: a Hub dataset is named as name, name:split or name:config:split")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    return _load(hub, config, split=split, streaming=streaming)


def _load(path: str, config: str | None = None, **options: Any) -> Any:
    with needs("train"):
        from datasets import load_dataset

    try:
        return load_dataset(path, config, **options)
    except Exception as error:  # the Hub client, its HTTP library and datasets each raise their own kinds
        raise TokenselError(
            f"{path}: cannot be loaded ({reason(error)}); give a local folder or parquet file"
        ) from None
