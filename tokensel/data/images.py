"""Where training pictures come from: a folder, a ``datasets`` dataset, a hub id, a parquet file, a list."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from tokensel.utils.errors import TokenselError, reason

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
# what Pillow raises on files that are cut short, damaged, no images at all, or absurdly large
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, Image.DecompressionBombError)


@dataclass
class ImageSource:
    """Rows that can be opened as pictures, in a fixed order.

    Attributes:
        name: what to call it in a model card.
        rows: a sequence, or an iterable dataset when streaming.
        length: number of rows; ``None`` when streaming, where it is unknown.
        column: the dataset column that holds the picture; empty for a folder or a list.
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
        """The picture in RGB and upright, or ``None`` if it cannot be read; then its name is noted."""
        try:
            return as_image(content)
        except UNREADABLE:
            if name not in self.skipped:
                self.skipped.append(name)
            return None

    def _unpack(self, index: int, row: Any) -> tuple[str, Any]:
        content = row[self.column] if self.column else row
        path = (
            content.get("path")
            if isinstance(content, dict)
            else content
            if isinstance(content, Path)
            else None
        )
        return str(path or f"row {index}"), content


def as_image(content: Any) -> Image.Image:
    """Decode a path, encoded bytes, a ``{"bytes", "path"}`` record, an array or a PIL image."""
    if isinstance(content, dict):
        content = content["path"] if content.get("bytes") is None else content["bytes"]
    if isinstance(content, bytes):
        content = io.BytesIO(content)
    if isinstance(content, (str, Path, io.BytesIO)):
        with Image.open(content) as image:
            # the camera may have been held sideways; convert() also decodes, so a cut file fails here
            return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(content, Image.Image):
        return content.convert("RGB")
    return Image.fromarray(content).convert("RGB")


def open_images(
    images: Any, column: str = "image", streaming: bool = False, limit: int | None = None
) -> ImageSource:
    """Find pictures.

    Args:
        images: a folder (searched to the bottom), a parquet file, a folder written by ``save_to_disk``, a hub
            id as ``name``, ``name:split`` or ``name:config:split``, a dataset, or a list of pictures.
        column: where a dataset keeps the picture.
        streaming: read a hub or parquet dataset row by row, without fetching all of it first.
        limit: take only the first so many rows.

    Raises:
        TokenselError: no pictures there, no such column, no such dataset or no way to the hub.
    """
    if limit is not None and limit < 1:
        raise TokenselError(f"limit is {limit}: give a count of at least 1, or leave it out")
    if isinstance(images, (str, Path)):
        name, rows = str(images), _find(str(images), streaming)
    else:
        name, rows = type(images).__name__, images
    if not type(rows).__module__.startswith("datasets."):
        if not len(rows):
            raise TokenselError(f"{name}: no images in it; give a folder or a dataset that has some")
        return ImageSource(name, rows, min(len(rows), limit or len(rows)))
    import datasets  # only here: importing it takes longer than all else, and folders do without

    if isinstance(rows, datasets.DatasetDict):
        raise TokenselError(f"{name}: has the splits {list(rows)}; name one, as in {name}:{list(rows)[0]}")
    columns, features = rows.column_names, rows.features
    if columns is not None and column not in columns:
        raise TokenselError(
            f"{name}: no column {column!r} among {columns}; name the one that holds the pictures"
        )
    if features is not None and isinstance(features[column], datasets.Image):
        # undecoded rows: what another process trains on is passed over unread, and a cut JPEG fails
        # where we can name it and not inside the dataset
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    if isinstance(rows, datasets.IterableDataset):
        return ImageSource(name, rows.take(limit) if limit else rows, None, column)
    if not len(rows):
        raise TokenselError(f"{name}: no rows in it; give a dataset that has some")
    return ImageSource(name, rows, min(len(rows), limit or len(rows)), column)


def _find(name: str, streaming: bool) -> Any:
    """Rows behind a name: paths of a folder, or a dataset."""
    path = Path(name)
    if path.is_dir():
        if (path / "dataset_info.json").exists() and (path / "state.json").exists():
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
    if path.suffix == ".parquet" and path.exists():
        return _load("parquet", split="train", data_files=[name], streaming=streaming)
    if path.is_absolute() or path.exists():
        raise TokenselError(f"{name}: neither a folder of images nor a parquet file")
    hub, *rest = name.split(":")
    if len(rest) > 2:
        raise TokenselError(f"{name}: a hub dataset reads name, name:split or name:config:split")
    config, split = (rest[0], rest[1]) if len(rest) == 2 else (None, rest[0] if rest else "train")
    return _load(hub, config, split=split, streaming=streaming)


def _load(*names: str | None, **options: Any) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(*names, **options)
    except Exception as error:  # the hub client, its HTTP library and datasets each raise their own kinds
        raise TokenselError(
            f"{names[0]}: cannot be loaded ({reason(error)}); give a local folder or parquet file"
        ) from None
