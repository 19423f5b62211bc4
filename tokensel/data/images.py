"""Where training pictures come from: a folder, a ``datasets`` dataset, a hub id, a parquet file, a list."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokensel.utils.errors import TokenselError, needs, reason

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
            return as_image(content, name)
        except ImageError:
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


class ImageError(TokenselError):
    """One image that cannot be read: missing, cut short, damaged or empty. Training skips and names it."""


def as_image(content: Any, name: str = "") -> Image.Image:
    """The image in RGB, 8 bits a channel and upright. Every image of the project comes through here.

    EXIF orientation is applied, 16-bit grey values are scaled to 8 bits, transparent images are laid on white,
    and of an animation the first or the current frame is taken. Images that are 8-bit RGB keep every bit.

    Args:
        content: a path, an encoded file as bytes or as an open binary file, a ``{"bytes", "path"}`` record of
            ``datasets``, a PIL image, or a NumPy array: ``[height, width]`` or ``[height, width, channels]``
            with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels, of type uint8, uint16 or bool, or of
            another integer type with values from 0 to 255.
        name: what errors call it; by default its path or its type.

    Raises:
        ImageError: there is no such file, or it is cut short, damaged, empty or no image.
        TokenselError: ``content`` is of none of these types, or its numbers have no known range.
    """
    if isinstance(content, dict):
        content = content.get("path") if content.get("bytes") is None else content["bytes"]
    is_path = isinstance(content, (str, os.PathLike))
    name = name or (os.fsdecode(content) if is_path else f"an image given as {type(content).__name__}")
    if content is None:
        raise ImageError(f"{name}: there is no image; give a path, bytes, an array or a PIL image")
    if isinstance(content, str) and "://" in content:
        raise TokenselError(f"{name}: is an address; download it and give the path of the file")
    if isinstance(content, np.ndarray):
        return _rgb(_from_array(content, name), name)
    if isinstance(content, Image.Image):
        return _rgb(content, name)
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = io.BytesIO(bytes(content))
    is_file = hasattr(content, "read") and not isinstance(content, io.TextIOBase)
    if not is_path and not is_file:
        raise TokenselError(
            f"{name}: {type(content).__name__} is no image; give a path, bytes, an array or a PIL image"
            + (", for a tensor tensor.permute(1, 2, 0).numpy()" if hasattr(content, "permute") else "")
        )
    with _readable(name), Image.open(content) as image:
        return _rgb(image, name)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Raise whatever Pillow raises for unreadable files as one line."""
    try:
        yield
    except TokenselError:
        raise
    except UNREADABLE as error:
        unknown = isinstance(error, UnidentifiedImageError)  # its message shows a memory address
        why = "not an image file, or damaged" if unknown else reason(error)
        raise ImageError(f"{name}: cannot be read ({why}); give a whole image file") from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, upright and opaque; the one given is left as it is."""
    if 0 in image.size:
        raise ImageError(f"{name}: is {image.width} x {image.height} pixels; give an image of at least 1 x 1")
    with _readable(name):
        file_format = image.format
        image = ImageOps.exif_transpose(image)  # the camera may have been held sideways
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_eight_bits(image, file_format, name)
        if image.mode == "La":
            image = image.convert("LA")  # Pillow converts grey with premultiplied alpha to nothing else
        if image.has_transparency_data:
            # the colour under a transparent pixel is arbitrary, often black; dark text would vanish in it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def _to_eight_bits(image: Image.Image, file_format: str | None, name: str) -> Image.Image:
    """Grey values of 16 bits scaled to 8; Pillow's own conversion would clip them to white."""
    values = np.asarray(image)
    sixteen = image.mode.startswith("I;16") or file_format in ("PNG", "PPM")
    if not sixteen and (image.mode == "F" or values.min() < 0 or values.max() > 255):
        raise TokenselError(
            f"{name}: has {'float' if image.mode == 'F' else '32-bit'} pixels of unknown range; "
            "scale them to 0 to 255 and give 8-bit pixels"
        )
    grey = ((values.astype(np.uint32) + 128) // 257 if sixteen else values).astype(np.uint8)
    transparent = image.info.get("transparency")  # of a PNG: the one grey value that is not painted
    if isinstance(transparent, int):
        grey = np.stack([grey, np.where(values == transparent, 0, 255).astype(np.uint8)], axis=-1)
    return Image.fromarray(grey)


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """An array of grey, grey and alpha, RGB or RGBA pixels as a PIL image."""
    shape = tuple(array.shape)
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and shape[2] in (2, 3, 4)):
        raise TokenselError(f"{name}: has the shape {shape}; give [height, width] or [height, width, 3]")
    if array.size == 0:
        raise ImageError(f"{name}: has the shape {shape}; give an image of at least 1 x 1")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array.astype(np.uint32) + 128) // 257
    elif array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise TokenselError(
            f"{name}: has values of type {array.dtype} outside 0 to 255 or of unknown range; "
            "scale them to 0 to 255 and give an array of uint8"
        )
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


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
    with needs("train"):
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
    with needs("train"):
        from datasets import load_dataset

    try:
        return load_dataset(*names, **options)
    except Exception as error:  # the hub client, its HTTP library and datasets each raise their own kinds
        raise TokenselError(
            f"{names[0]}: cannot be loaded ({reason(error)}); give a local folder or parquet file"
        ) from None
