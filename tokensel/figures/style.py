"""One plotting style for the book: colours that colour-blind readers can tell apart, type that can be read.

A method that is not in ``COLOURS`` gets a spare colour and marker by its place in ``LABELS``, one that is in
neither by its name.
"""

import zlib
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.colors import to_hex, to_rgb

DPI = 110
COLUMN = 704  # CSS pixels that the theme leaves for a figure on a page 1,300 pixels wide
WIDTH = COLUMN / 96  # inches; on a figure that is no wider, type is shown at its size in points or larger
LABEL = 8.5  # points: the smallest type in a figure

# Okabe and Ito's palette (2008)
ORANGE, BLUE, GREEN, RED = "#E69F00", "#0072B2", "#009E73", "#D55E00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#7F7F7F"

# As in the paper's figures: selector orange, random blue, all tokens green and no image red, both dashed.
COLOURS = {
    "selector": ORANGE,
    "random": BLUE,
    "full": GREEN,
    "none": RED,
    "uniform": SKY,
    "norm": PURPLE,
    "cls": "#8C6D31",
    "diversity": BLACK,
    "downsample": GREY,
    "native": "#882255",  # wine, of Tol's palette
    "fastv": "#332288",  # indigo, of Tol's palettes as the spare ones
    "vtw": RED,
    "dyrate": "#117733",
    "fixed": SKY,
    "exponential": PURPLE,
    "selector+fastv": "#8C6D31",
}
# for methods without a colour of their own; of Tol's palettes
SPARE_COLOURS = ("#44AA99", "#999933", "#AA4499", "#CC6677", "#661100", "#6699CC")
MARKERS = {
    "selector": "o",
    "random": "s",
    "uniform": "^",
    "norm": "D",
    "cls": "v",
    "diversity": "P",
    "downsample": "X",
    "full": "*",
    "none": "x",
    "native": "o",
    "fastv": "s",
    "vtw": "X",
    "dyrate": "P",
    "fixed": ">",
    "exponential": "<",
    "selector+fastv": "D",
}
SPARE_MARKERS = ("p", "h", "<", ">", "d", "8")
LABELS = {
    "full": "all tokens",
    "none": "no image",
    "uniform": "uniform grid",
    "norm": "feature norm",
    "cls": "CLS attention",
    "dart": "DART",
    "hired": "HiRED",
    "apet": "ApET",
    "visionzip": "VisionZip",
    "scope": "SCOPE",
    "cdpruner": "CDPruner",
    "diffprune": "DiffPrune",
    "visionselector": "VisionSelector",
    "asked": "read twice",
    "pool": "average pooling",
    "downsample": "down-sampling",
    "native": "own interpolation",
    "fastv": "FastV",
    "vtw": "VTW",
    "dyrate": "DyRate",
    "fixed": "fixed rate",
    "exponential": "exponential rate",
    "pyramiddrop": "PyramidDrop",
    "fastocr": "FastOCR",
    "feather": "FEATHER",
    "sparsevlm": "SparseVLM",
    "priortr": "PriorTR",
    "clse": "CLSE",
    "random-cut": "late random cut",
    "oracle": "oracle",
    "drawn": "what is drawn",
    "selector+fastv": "selector, then FastV",
}


def colour(method: str) -> str:
    """The fixed colour of a method."""
    return COLOURS.get(method) or SPARE_COLOURS[_spare(method)[0]]


def marker(method: str) -> str:
    """The fixed marker of a method; together with its colour no other method of ``LABELS`` has it."""
    return MARKERS.get(method) or SPARE_MARKERS[_spare(method)[1]]


def _spare(method: str) -> tuple[int, int]:
    """Which spare colour and marker: each colour once with the first marker after its own, and so on."""
    names = [name for name in LABELS if name not in COLOURS]
    place = names.index(method) if method in names else zlib.crc32(method.encode())
    turn, column = divmod(place, len(SPARE_COLOURS))
    return column, (column + turn) % len(SPARE_MARKERS)


def label(method: str) -> str:
    """The method's name as a reader should see it."""
    return LABELS.get(method) or method.replace("_", " ")


def fit(width: float) -> float:
    """The width of a figure in inches: ``width``, or that of the page's column where it would be wider.

    Every figure of the book takes its width from here, since the page would scale a wider one down and its
    type with it. Panels that get too narrow go into a second row.
    """
    return min(width, WIDTH)


def rendered_size(points: float, width: float) -> float:
    """Size of type on a page 1,300 pixels wide, in points.

    Args:
        points: its size in the figure.
        width: of the figure in inches. A figure wider than the page's column is scaled down to it.
    """
    css_pixels = points / 72 * DPI * min(1.0, COLUMN / (width * DPI))
    return css_pixels * 72 / 96


def text_colour(colour: Any) -> str:
    """The colour for text: darkened until its contrast with white is 4.5 to 1, as WCAG 2 requires."""
    share = next(k for k in range(100, -1, -1) if _contrast([k / 100 * c for c in to_rgb(colour)]) >= 4.5)
    red, green, blue = (share / 100 * c for c in to_rgb(colour))
    return to_hex((red, green, blue))


def _contrast(rgb: list[float]) -> float:
    """Contrast with white by WCAG 2: relative luminance of sRGB, both raised by 0.05."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def use() -> None:
    """Set matplotlib's defaults to the book's style, whatever they were before."""
    mpl.rcdefaults()
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E5E5E5",
            "grid.linewidth": 0.6,
            "figure.dpi": DPI,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "legend.fontsize": LABEL,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4,
            "image.interpolation": "nearest",
            "image.cmap": "cividis",
            "savefig.dpi": DPI,
            "svg.hashsalt": "tokensel",
            "xtick.labelsize": LABEL,
            "ytick.labelsize": LABEL,
        }
    )
