"""One function reads every image: the same pixels by every way in, and one clear line for everything else."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tokensel.data.images import ImageError, as_image
from tokensel.utils.errors import TokenselError

ORIENTATION = 0x0112  # the EXIF tag
# what must be done to the stored pixels, by the EXIF standard's eight values of that tag
UPRIGHT = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1], 8: lambda a: a.swapaxes(0, 1)[::-1],
}  # fmt: skip


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def pixels(content):
    image = as_image(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@st.composite
def drawn_images(draw):
    """A PIL image of some mode, and what it looks like: its RGB pixels, laid on white."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    mode = draw(st.sampled_from(["1", "L", "RGB", "LA", "RGBA", "P", "I;16", "L key", "RGB key"]))
    grey = generator.integers(0, 256, (height, width), dtype=np.uint8)
    colour = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    opaque = generator.integers(0, 2, (height, width)).astype(bool)
    shown = np.stack([grey] * 3, -1)
    on_white = lambda rgb: np.where(opaque[..., None], rgb, 255)  # noqa: E731 - one line serves three modes
    alpha = np.where(opaque, 255, 0).astype(np.uint8)
    match mode:
        case "1":
            return Image.fromarray(opaque), np.stack([np.where(opaque, 255, 0)] * 3, -1), {}
        case "L":
            return Image.fromarray(grey), shown, {}
        case "RGB":
            return Image.fromarray(colour), colour, {}
        case "LA":
            return Image.fromarray(np.stack([grey, alpha], -1)), on_white(shown), {}
        case "RGBA":
            return Image.fromarray(np.concatenate([colour, alpha[..., None]], -1)), on_white(colour), {}
        case "P":
            image = Image.fromarray(grey, "L").convert("P")
            return image, shown, {}
        case "I;16":  # 257 steps of 16 bits are one of 8
            return Image.fromarray(grey.astype(np.uint16) * 257), shown, {}
        case "L key":  # a PNG may name one grey value or colour that is not painted
            opaque = grey != grey[0, 0]
            return Image.fromarray(grey), on_white(shown), {"transparency": int(grey[0, 0])}
        case _:
            opaque = (colour != colour[0, 0]).any(-1)
            key = tuple(map(int, colour[0, 0]))
            return Image.fromarray(colour), on_white(colour), {"transparency": key}


@settings(max_examples=150, deadline=None)
@given(drawn_images(), st.sampled_from(sorted(UPRIGHT)))
def test_every_way_in_gives_the_same_pixels(tmp_path_factory, drawn, orientation):
    image, shown, options = drawn
    expected = UPRIGHT[orientation](shown)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(image, exif=exif, **options)
    path = tmp_path_factory.getbasetemp() / "drawn.png"
    path.write_bytes(content)
    at_end = io.BytesIO(content)
    at_end.seek(0, io.SEEK_END)
    ways = [path, str(path), content, bytearray(content), at_end, {"bytes": content, "path": None},
            {"bytes": None, "path": str(path)}, Image.open(path)]  # fmt: skip
    for way in ways:
        assert np.array_equal(pixels(way), expected), (image.mode, orientation, type(way))
    if not options:
        array = np.asarray(image)
        assert np.array_equal(pixels(image), shown)
        if image.mode != "P":
            assert np.array_equal(pixels(array), shown)
        if image.mode == "L":
            assert np.array_equal(pixels(array[..., None].astype(np.int64)), shown)


def test_the_image_given_is_left_as_it_is():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.open(io.BytesIO(encoded(Image.new("RGBA", (4, 2)), exif=exif)))
    assert as_image(image).size == (2, 4)
    assert image.size == (4, 2) and image.mode == "RGBA" and image.getexif()[ORIENTATION] == 6
    fresh = as_image(rgb := Image.new("RGB", (3, 3)))
    assert fresh is not rgb


def test_sixteen_bits_are_scaled_and_rounded_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.round(values / 257).astype(np.uint8)
    for image in (values, values.astype(">u2"), Image.fromarray(values), encoded(Image.fromarray(values))):
        assert np.array_equal(pixels(image)[..., 0], expected)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PPM")  # Pillow reads it as 32-bit pixels
    assert np.array_equal(pixels(file)[..., 0], expected)
    assert pixels(Image.fromarray(np.full((2, 2), 200, np.int32))).max() == 200


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 128))
    expected = np.array([0, 100, 200]) * 128 / 255 + 255 * (1 - 128 / 255)
    assert np.abs(pixels(image)[0, 0] - expected).max() <= 1
    for mode in ("La", "RGBa", "PA"):  # premultiplied alpha, and a palette with alpha: invisible is white
        assert pixels(Image.new(mode, (2, 2))).min() == 255


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "I", "I;16", "I;16B", "I;16L"])
def test_every_other_mode_of_pillow_is_read(mode):
    assert pixels(Image.new(mode, (3, 2))).shape == (2, 3, 3)


WHOLE = encoded(Image.new("RGB", (40, 30), "red"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        (b"", "not an image file"),
        (b"text", "not an image file"),
        (WHOLE[: len(WHOLE) // 2], "cannot be read"),
        (Image.open(io.BytesIO(WHOLE[: len(WHOLE) // 2])), "cannot be read"),
        ("none.png", "none.png: cannot be read"),
        ("a\0b", "cannot be read"),
        (Image.new("RGB", (0, 5)), "is 0 x 5 pixels"),
        (np.zeros((0, 5, 3), np.uint8), r"has the shape \(0, 5, 3\)"),
    ],
)
def test_an_image_that_cannot_be_read_is_an_image_error(content, words):
    with pytest.raises(ImageError, match=words) as caught:
        as_image(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("https://example.org/a.png", "is an address; download it"),
        (7, "int is no image"),
        (3.0, "float is no image"),
        ([Image.new("RGB", (2, 2))], "list is no image"),
        (io.StringIO("text"), "StringIO is no image"),
        (torch.zeros(3, 4, 4), "Tensor is no image.*tensor.permute"),
        (np.float64(1), "float64 is no image"),
        (np.zeros((3, 20, 30), np.uint8), r"has the shape \(3, 20, 30\)"),
        (np.zeros(3, np.uint8), r"has the shape \(3,\)"),
        (np.full((4, 4, 3), np.nan), "of type float64"),
        (np.zeros((4, 4), np.float32), "of type float32"),
        (np.full((4, 4), -1), "outside 0 to 255"),
        (np.full((4, 4), 256), "outside 0 to 255"),
        (np.full((4, 4), "x", dtype=object), "of type object"),
        (Image.new("F", (2, 2)), "float pixels of unknown range"),
        (Image.new("I", (2, 2), 70000), "32-bit pixels of unknown range"),
    ],
)
def test_what_is_no_image_gets_one_line(content, words):
    with pytest.raises(TokenselError, match=words) as caught:
        as_image(content, "row 3")
    assert not isinstance(caught.value, ImageError)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("row 3: ")


def damaged_files():
    """Encoded images with some bytes changed, and cut."""
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (20, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    whole = []
    for kind, options in (("PNG", {"exif": exif}), ("JPEG", {"exif": exif}), ("GIF", {}), ("TIFF", {}),
                          ("BMP", {}), ("WEBP", {}), ("PPM", {})):  # fmt: skip
        file = io.BytesIO()
        image.save(file, kind, **options)
        whole.append(file.getvalue())
    changes = st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=4)
    return st.tuples(st.sampled_from(whole), changes, st.integers(1, 4000))


@settings(max_examples=300, deadline=None)
@given(damaged_files())
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds odd in damaged files
def test_a_damaged_file_is_an_image_or_one_line(damaged):
    content, changes, length = damaged
    content = bytearray(content[:length])
    for place, value in changes:
        content[place % len(content)] = value
    try:
        assert as_image(bytes(content)).mode == "RGB"
    except TokenselError as error:
        assert "\n" not in str(error)


anything = st.recursive(
    st.one_of(
        st.none(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=40), st.booleans()
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
dtypes = st.sampled_from(
    ["u1", "u2", ">u2", "i4", "i8", "f2", "f4", "f8", "c8", "?", "S3", "U2", "O", "M8[s]"]
)
shapes = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=200, deadline=None)
@given(anything | st.builds(lambda d, s: np.zeros(s, d), dtypes, shapes))
@example("\n")
@example("https://a\n")
def test_anything_at_all_is_an_image_or_one_line(content):
    try:
        assert as_image(content).mode == "RGB"
    except TokenselError as error:
        assert "\n" not in str(error)
