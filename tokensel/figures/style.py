"""One plotting style for the whole book: colours that colour-blind readers can tell apart, and one colour a method."""

import matplotlib as mpl
from cycler import cycler
from matplotlib.colors import to_rgb

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
    "fastv": BLUE,
    "vtw": RED,
    "dyrate": BLACK,
    "fixed": SKY,
    "exponential": PURPLE,
    "selector+fastv": "#8C6D31",
}
MARKERS = {
    "selector": "o",
    "random": "s",
    "uniform": "^",
    "norm": "D",
    "cls": "v",
    "diversity": "P",
    "downsample": "X",
    "full": "*",
    "fastv": "s",
    "vtw": "X",
    "dyrate": "P",
    "fixed": "^",
    "exponential": "v",
    "selector+fastv": "D",
}
LABELS = {
    "full": "all tokens",
    "none": "no image",
    "uniform": "uniform grid",
    "norm": "feature norm",
    "cls": "CLS attention",
    "downsample": "down-sampling",
    "native": "own interpolation",
    "fastv": "FastV",
    "vtw": "VTW",
    "dyrate": "DyRate",
    "fixed": "fixed rate",
    "exponential": "exponential rate",
    "selector+fastv": "selector, then FastV",
}


def colour(method: str) -> str:
    """The fixed colour of a method; grey for one that has none."""
    return COLOURS.get(method, GREY)


def label(method: str) -> str:
    """The method's name as a reader should see it."""
    return LABELS.get(method, method)


def text_colour(colour: str) -> str:
    """The colour for words: darker where it would not stand out from white by 4.5 to 1, as WCAG 2 asks of small type."""
    share = next(k for k in range(100, -1, -1) if _contrast([k / 100 * c for c in to_rgb(colour)]) >= 4.5)
    return mpl.colors.to_hex([share / 100 * c for c in to_rgb(colour)])


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
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.facecolor": "white",
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 4,
            "image.interpolation": "nearest",
            "image.cmap": "cividis",
            "savefig.dpi": 110,
            "svg.hashsalt": "tokensel",
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
        }
    )
