"""Reading one image: the same pixels by every way in, and one clear line for what is no image."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tokensel.utils.errors import TokenselError, reason

# what Pillow raises on files that are cut short, damaged, no images at all, or absurdly large
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, Image.DecompressionBombError)


class ImageError(TokenselError):
    """One image that cannot be read: missing, cut short, damaged or empty. Training skips and names it."""


def as_image(content: Any, name: str = "") -> Image.Image:
    """The image in RGB, 8 bits a channel and upright. Every image of the project comes through here.

    EXIF orientation is applied, 16-bit grey values are scaled to 8 bits, transparent images are laid on
    white, and of an animation the current frame is taken, the first of a file. 8-bit RGB keeps every bit.

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
    name = name if name.isprintable() else repr(name)  # a path may have line breaks, an error is one line
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
    file: Any = content
    with _readable(name), Image.open(file) as image:
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
