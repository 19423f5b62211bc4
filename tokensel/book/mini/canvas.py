"""A canvas that records what is drawn in which patch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tokensel.book.mini.words import ALPHABET, COLORS, SHAPES
from tokensel.utils.files import write_atomic

TILE, PATCH = 64, 8  # pixels; a tile is what the vision tower sees at once
CELLS = TILE // PATCH
PAPERS = ("plain", "gradient", "grain", "stripes", "checks", "dots")
GROWTH = (7.0, 9.0, 11.0, 13.0)  # radii in pixels: the borders between one size of shapes and the next
OBJECTS = (*SHAPES, "arrow right", "arrow down", "arrow left", "arrow up")
ILLEGIBLE = len(ALPHABET) + 1  # the label of text too small to read; 0 is "no letter here"
CHAIN_END = len(SHAPES) + 1
OPTION_LETTERS = "ABCD"

FONT_DIR = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = (
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "cmtt10",
    "cmss10",
)
# (advance, font size) in pixels: never two letters' centres in one 8-pixel patch
SIZES = ((8, 12), (8, 13), (9, 13), (9, 14), (10, 15), (10, 16))


Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the page


@dataclass
class QA:
    """One question about a page, in the columns of the benchmarks.

    ``evidence`` is what has to be seen for the answer; nothing where the page's background is asked for.
    """

    question: str
    answers: list[str]
    category: str
    options: list[str] = field(default_factory=list)
    spot: tuple[float, float] | None = None  # for training: the position asked about, see Canvas.spot
    evidence: list[Box] = field(default_factory=list)

    @property
    def named(self) -> str:
        """The answer in words: for a multiple-choice question, the option instead of its letter."""
        return self.options[OPTION_LETTERS.index(self.answers[0])] if self.options else self.answers[0]


@dataclass
class Page:
    """A drawn image, its questions, and labels of the patches of its tiles.

    ``letters``, ``shapes``, ``colors``, ``objects``, ``sizes`` and ``papers`` are ``[tiles, 8, 8]`` integer
    labels, the thumbnail first, as LLaVA-NeXT orders tiles; 0 means nothing there, or not known. ``objects``
    and ``sizes`` mark only the patch in which a shape has its centre or an arrow its head, so that things can
    be counted and compared; ``papers`` is what the whole page is drawn on; ``before`` and ``earlier`` are the
    letter in front of a letter in its word and the one in front of that; ``leader`` and ``follower`` are the
    shapes before and after a shape in a chain, or ``CHAIN_END``. A page of a single tile has no thumbnail.

    ``practice`` are exercises for the small model's training, that no benchmark asks: the same facts asked
    about from another side (which field a value belongs to, at which corner a shape lies).

    ``drawn`` are the boxes of all text, panels, shapes and arrows; the paper and the clutter on it are none.
    """

    image: Image.Image
    questions: list[QA]
    practice: list[QA]
    letters: np.ndarray
    shapes: np.ndarray
    colors: np.ndarray
    objects: np.ndarray
    sizes: np.ndarray
    papers: np.ndarray
    before: np.ndarray
    earlier: np.ndarray
    leader: np.ndarray
    follower: np.ndarray
    drawn: list[Box]

    def save(self, path: str | Path) -> Path:
        """Write the image as PNG, atomically."""
        return write_atomic(path, lambda part: self.image.save(part, "PNG"))


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONT_DIR / f"{name}.ttf"), size)


@lru_cache(maxsize=8192)
def _glyph(name: str, size: int, char: str, advance: int) -> Image.Image:
    """The letter as a mask ``advance`` wide and ``size`` high, squeezed where the font is wider."""
    font = _font(name, size)
    left, _, right, _ = (int(edge) for edge in font.getbbox(char, anchor="ls"))
    width = max(right - left, 1)
    cell = Image.new("L", (width, size), 0)
    ImageDraw.Draw(cell).text((-left, round(0.86 * size)), char, fill=255, font=font, anchor="ls")
    if width > advance:
        return cell.resize((advance, size), Image.Resampling.BILINEAR)
    full = Image.new("L", (advance, size), 0)
    full.paste(cell, ((advance - width) // 2, 0))
    return full


class Canvas:
    """Draws text and shapes on a page; no letter is cut by a border between tiles."""

    def __init__(self, background: np.ndarray, kind: str | None = None):
        self.image = Image.fromarray(background.astype(np.uint8), "RGB")
        self.pen = ImageDraw.Draw(self.image)
        self.width, self.height = self.image.size
        self.grid = (-(-self.height // TILE), -(-self.width // TILE))  # rows and columns of tiles
        # LLaVA-NeXT letterboxes the page in the middle of its grid of tiles
        self.offset = ((self.grid[0] * TILE - self.height) // 2, (self.grid[1] * TILE - self.width) // 2)
        self.shape_map = Image.new("L", self.image.size, 0)
        self.color_map = Image.new("L", self.image.size, 0)
        self.glyphs: list[
            tuple[str, float, float, str]
        ] = []  # what, where, and what stands before it in its word
        self.objects: list[tuple[str, float, float, int]] = []  # what, where, and how large, 0 for no size
        self.chain: list[
            tuple[str, float, float]
        ] = []  # shapes and where they are, if arrows join them, in their order
        self.boxes: list[Box] = []  # of all that is drawn, in that order
        self.kind = kind

    def snap_y(self, y: int, height: int) -> int:
        """The row nearest to ``y`` at which a line ``height`` high is not cut by a tile border."""
        for border in range(TILE - self.offset[0], self.height, TILE):
            if y < border < y + height:
                y = border if border - y < height / 2 and border + height <= self.height else border - height
        return y

    def text(self, x: int, y: int, text: str, font: str, size: tuple[int, int], ink) -> tuple[int, int]:
        """Write ``text`` with its top left near (x, y), shifted so that no letter is cut by a tile border.

        Returns:
            The x of the end of the text and the y at which it was set.
        """
        advance, points = size
        y = self.snap_y(y, points)
        for border in range(TILE - self.offset[1], self.width, TILE):
            if x < border < x + advance * len(text):
                shift = (border - x) % advance
                x += shift if shift <= advance / 2 or x + shift - advance < 0 else shift - advance
        if x + advance * len(text) > self.width:
            x -= advance
        self.mark(x, y, x + advance * len(text), y + points)
        for place, char in enumerate(text):
            if char == " ":
                continue
            glyph = _glyph(font, points, char, advance)
            self.image.paste(ink, (x + place * advance, y), glyph)
            before = text[:place].rpartition(" ")[2]
            self.glyphs.append((char, x + (place + 0.5) * advance, y + 0.5 * points, before))
        return x + advance * len(text), y

    def shape(self, kind: str, color: str, x: float, y: float, radius: float, rgb=None) -> None:
        """Draw a filled shape centred on (x, y)."""
        self.objects.append((kind, x, y, 1 + sum(radius > step for step in GROWTH)))
        self.mark(x - radius, y - radius, x + radius, y + radius)
        for pen, fill in (
            (self.pen, rgb or COLORS[color]),
            (ImageDraw.Draw(self.shape_map), SHAPES.index(kind) + 1),
            (ImageDraw.Draw(self.color_map), list(COLORS).index(color) + 1),
        ):
            _draw_shape(pen, kind, x, y, radius, fill)

    def panel(self, box: tuple[int, int, int, int], color: str, rgb=None) -> None:
        """Fill a rectangle (x0, y0, x1, y1); its color is remembered, it is no shape."""
        self.mark(*box)
        self.pen.rectangle(box, fill=rgb or COLORS[color])
        ImageDraw.Draw(self.color_map).rectangle(box, fill=list(COLORS).index(color) + 1)

    def mark(self, *edges: Any) -> None:
        """Remember that something is drawn in the box with these edges: left, top, right and bottom."""
        left, top, right, bottom = map(float, edges)
        self.boxes.append((left, top, right, bottom))

    def spot(self, x: float, y: float, other: tuple[float, float] | None = None) -> tuple[float, float]:
        """Offset of (x, y) from ``other``, by default the page's middle, in halves of the page."""
        a, b = other or (self.width / 2, self.height / 2)
        return 2 * (x - a) / self.width, 2 * (y - b) / self.height

    def finish(self, questions: list[QA], practice: Sequence[tuple] = ()) -> Page:
        """Finish the page. Each of ``practice`` is question and answer, and the spot if there is one."""
        rows, columns = self.grid
        zeros = np.zeros((8, 1 + rows * columns, CELLS, CELLS), np.int64)
        letters, objects, sizes, papers, before, earlier, leader, follower = zeros
        for char, x, y, word in self.glyphs:
            small, large = self._places(x, y)
            letters[small], letters[large] = ILLEGIBLE, ALPHABET.index(char) + 1
            before[large], earlier[large] = ([0, 0] + [ALPHABET.index(letter) + 1 for letter in word])[:-3:-1]
        for kind, x, y, size in self.objects:
            for place in self._places(x, y):
                objects[place], sizes[place] = OBJECTS.index(kind) + 1, size
        links = [CHAIN_END, *(SHAPES.index(kind) + 1 for kind, _, _ in self.chain), CHAIN_END]
        for number, (_, x, y) in enumerate(self.chain):
            for place in self._places(x, y):
                leader[place], follower[place] = links[number], links[number + 2]
        if self.kind:
            papers[:] = PAPERS.index(self.kind) + 1
        shapes, colors = self._cells(self.shape_map), self._cells(self.color_map)
        labels = (letters, shapes, colors, objects, sizes, papers, before, earlier, leader, follower)
        first = int(rows * columns == 1)  # the thumbnail of a single tile would be the tile
        exercises = [
            QA(question, [answer], "practice", spot=spot[0] if spot else None)
            for question, answer, *spot in practice
        ]
        return Page(self.image, questions, exercises, *(label[first:] for label in labels), drawn=self.boxes)

    def _places(self, x: float, y: float) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """(tile, row, column) of the patch that holds the point (x, y), in the thumbnail and in the tiles."""
        row, column = int(y + self.offset[0]) // PATCH, int(x + self.offset[1]) // PATCH
        tile = 1 + row // CELLS * self.grid[1] + column // CELLS
        thumbnail = (0, int(y * CELLS / self.height), int(x * CELLS / self.width))
        return thumbnail, (tile, row % CELLS, column % CELLS)

    def _cells(self, drawn: Image.Image) -> np.ndarray:
        """The value at the middle of each patch: ``[tiles, 8, 8]``, thumbnail first."""
        rows, columns = self.grid
        pixels = np.asarray(drawn)
        y = ((np.arange(CELLS) + 0.5) * self.height / CELLS).astype(int)
        x = ((np.arange(CELLS) + 0.5) * self.width / CELLS).astype(int)
        padded = np.zeros((rows * TILE, columns * TILE), np.int64)
        padded[
            self.offset[0] : self.offset[0] + self.height, self.offset[1] : self.offset[1] + self.width
        ] = pixels
        centres = padded[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
        tiles = centres.reshape(rows, CELLS, columns, CELLS).swapaxes(1, 2).reshape(-1, CELLS, CELLS)
        return np.concatenate([pixels[np.ix_(y, x)][None].astype(np.int64), tiles])


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, fill) -> None:
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif kind == "square":
        pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=fill)
    elif kind == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=fill)
    elif kind == "cross":
        pen.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=fill)
        pen.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=fill)
    elif kind == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(3, round(0.42 * r)))
    else:  # star
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2, 0.45 * r, 1.08 * r)
        pen.polygon(list(zip(x + reach * np.cos(turns), y + reach * np.sin(turns))), fill=fill)


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """One of ``items`` at random."""
    return items[int(rng.integers(len(items)))]


def pattern(rng: np.random.Generator, kind: str, size: tuple[int, int]) -> np.ndarray:
    """Where the marks of stripes, checks or dots lie: True in an array of ``size`` (height, width)."""
    y, x = np.mgrid[: size[0], : size[1]]
    period = int(rng.integers(8, 15))
    phase = int(rng.integers(period))
    if kind == "stripes":
        return ((y if rng.integers(2) else x) + phase) % period < period // 2
    if kind == "checks":
        return ((y + phase) // (period // 2) + (x + phase) // (period // 2)) % 2 == 0
    return (((y + phase) % period - period / 2) ** 2 + ((x + phase) % period - period / 2) ** 2) < 5


def paper(rng: np.random.Generator, size: tuple[int, int], kind: str | None = None) -> np.ndarray:
    """A light background of ``size`` (height, width); ``kind`` is one of ``PAPERS``."""
    height, width = size
    kind = kind or ("plain", "gradient", "grain")[int(rng.integers(3))]
    base = rng.integers(205, 256) + rng.integers(-12, 13, 3)
    background = np.empty((height, width, 3), np.float32)
    background[:] = base
    if kind == "gradient":
        y, x = np.mgrid[:height, :width]
        slope = rng.uniform(-22, 22, 2)
        background += (slope[0] * y / height + slope[1] * x / width)[..., None]
    elif kind in ("stripes", "checks", "dots"):
        background -= pattern(rng, kind, size)[..., None] * rng.uniform(22, 40)
    background += rng.normal(
        0, rng.uniform(0, 9) if kind == "grain" else rng.uniform(0, 2.5), (height, width, 1)
    )
    return background.clip(0, 255)


def dark_color(rng: np.random.Generator) -> tuple[int, int, int]:
    """A dark color for text."""
    red, green, blue = (int(value) for value in rng.integers(0, 75, 3))
    return red, green, blue
