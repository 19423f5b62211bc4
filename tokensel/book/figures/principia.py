"""A page of Newton's Principia, typeset here, in place of the scan in the paper's Fig. 1.

The text is the three laws of motion with their explanations as printed in the first edition (London 1687,
pp. 12-13), long s as s and the ligature æ kept; it is in the public domain. Fonts are those that come with
matplotlib, so the page is the same on every machine with the same versions of the packages.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from tokensel.utils.errors import TokenselError

PAPER = (244, 235, 214)
INK = (46, 36, 28)
OVERSAMPLE = 4  # small type is set large and reduced: at its own size, hinting would make letters touch

LAWS = (
    (
        "Lex. I.",
        "Corpus omne perseverare in statu suo quiescendi vel movendi uniformiter in directum, nisi "
        "quatenus a viribus impressis cogitur statum illum mutare.",
        "Projectilia perseverant in motibus suis nisi quatenus a resistentia aeris retardantur & vi "
        "gravitatis impelluntur deorsum. Trochus, cujus partes cohærendo perpetuo retrahunt sese a "
        "motibus rectilineis, non cessat rotari nisi quatenus ab aere retardatur. Majora autem Planetarum "
        "& Cometarum corpora motus suos & progressivos & circulares in spatiis minus resistentibus factos "
        "conservant diutius.",
    ),
    (
        "Lex. II.",
        "Mutationem motus proportionalem esse vi motrici impressæ, & fieri secundum lineam rectam qua vis "
        "illa imprimitur.",
        "Si vis aliqua motum quemvis generet, dupla duplum, tripla triplum generabit, sive simul & semel, "
        "sive gradatim & successive impressa fuerit. Et hic motus quoniam in eandem semper plagam cum vi "
        "generatrice determinatur, si corpus antea movebatur, motui ejus vel conspiranti additur, vel "
        "contrario subducitur, vel obliquo oblique adjicitur, & cum eo secundum utriusq; determinationem "
        "componitur.",
    ),
    (
        "Lex. III.",
        "Actioni contrariam semper & æqualem esse reactionem: sive corporum duorum actiones in se mutuo "
        "semper esse æquales & in partes contrarias dirigi.",
        "Quicquid premit vel trahit alterum, tantundem ab eo premitur vel trahitur. Siquis lapidem digito "
        "premit, premitur & hujus digitus a lapide. Si equus lapidem funi allegatum trahit, retrahetur "
        "etiam & equus æqualiter in lapidem: nam funis utrinq; distentus eodem relaxandi se conatu "
        "urgebit Equum versus lapidem, ac lapidem versus equum, tantumq; impediet progressum unius "
        "quantum promovet progressum alterius. Si corpus aliquod in corpus aliud impingens, motum ejus vi "
        "sua quomodocunq; mutaverit, idem quoque vicissim in motu proprio eandem mutationem in partem "
        "contrariam vi alterius (ob æqualitatem pressionis mutuæ) subibit. His actionibus æquales fiunt "
        "mutationes non velocitatum sed motuum, (scilicet in corporibus non aliunde impeditis:) "
        "Mutationes enim velocitatum, in contrarias itidem partes factæ, quia motus æqualiter mutantur, "
        "sunt corporibus reciproce proportionales.",
    ),
)


@dataclass(frozen=True)
class Line:
    """A set line: words with their left edges, all in pixels from the left edge of the text block."""

    words: tuple[tuple[float, str], ...]
    face: str
    size: float
    above: float = 0.0  # space above it, in units of the body size


def principia_page(
    width: int = 512, height: int = 704, paper: tuple[int, int, int] = PAPER, ink: tuple[int, int, int] = INK
) -> Image.Image:
    """The page as an RGB image, in the largest type with which the whole text fits.

    Args:
        width: pixels, at least 128.
        height: pixels, at least 128.
        paper: colour of the paper, 0..255 a channel.
        ink: colour of the type.

    Raises:
        TokenselError: a page that is too small for the text.
    """
    if min(width, height) < 128:
        raise TokenselError(f"a page of {width} x {height} pixels: give at least 128 x 128")
    margin_x, margin_y = 0.09 * width, 0.06 * height
    block, room = width - 2 * margin_x, height - 2 * margin_y
    size = _largest_size(block, room)
    image = Image.new("RGB", (OVERSAMPLE * width, OVERSAMPLE * height), paper)
    draw = ImageDraw.Draw(image)
    y = margin_y
    for line in _lines(block, size):
        y += line.above * size
        font = _font(line.face, OVERSAMPLE * line.size)
        for x, word in line.words:
            place = (OVERSAMPLE * (margin_x + x), OVERSAMPLE * (y + line.size))
            draw.text(place, word, font=font, fill=ink, anchor="ls")
        y += 1.22 * line.size
    return image.resize((width, height), Image.Resampling.BOX)


def _largest_size(block: float, room: float) -> float:
    low, high = 1.0, 0.1 * block
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if _height(_lines(block, middle), middle) <= room else (low, middle)
    return low


def _height(lines: list[Line], size: float) -> float:
    return sum(line.above * size + 1.22 * line.size for line in lines)


def _lines(block: float, size: float) -> list[Line]:
    lines = [
        _centred("[ 12 ]", "STIXGeneral", size, block),
        _centred("AXIOMATA", "STIXGeneral", 1.9 * size, block, above=1.0),
        _centred("SIVE", "STIXGeneral", 1.1 * size, block, above=0.2),
        _centred("LEGES MOTUS", "STIXGeneral", 1.6 * size, block, above=0.2),
    ]
    for heading, law, explanation in LAWS:
        lines.append(_centred(heading, "STIXGeneral", 1.15 * size, block, above=0.9))
        lines += _justified(law, "STIXGeneralItalic", 1.08 * size, block, above=0.35)
        lines += _justified(explanation, "STIXGeneral", size, block, above=0.45)
    return lines


def _centred(text: str, face: str, size: float, block: float, above: float = 0.0) -> Line:
    return Line((((block - _length(text, face, size)) / 2, text),), face, size, above)


def _justified(text: str, face: str, size: float, block: float, above: float) -> list[Line]:
    """A paragraph with its first line indented, every line but the last filled to the block's width."""
    indent, space = 1.5 * size, _length(" ", face, size)
    lines: list[Line] = []
    words: list[tuple[str, float]] = []

    def close(last: bool) -> None:
        start = 0.0 if lines else indent
        free = block - start - sum(length for _, length in words)
        gap = space if last or len(words) == 1 else free / (len(words) - 1)
        placed = []
        for word, length in words:
            placed.append((start, word))
            start += length + gap
        lines.append(Line(tuple(placed), face, size, 0.0 if lines else above))

    for word in text.split():
        length = _length(word, face, size)
        room = block - (0.0 if lines else indent)
        if words and sum(n for _, n in words) + space * len(words) + length > room:
            close(last=False)
            words = []
        words.append((word, length))
    close(last=True)
    return lines


@lru_cache(maxsize=256)
def _font(face: str, size: float) -> ImageFont.FreeTypeFont:
    # the basic layout engine: the other one depends on a library that not every build of Pillow has
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _length(text: str, face: str, size: float) -> float:
    # measured large and scaled down, so that hinting at small sizes does not change the line breaks
    return _font(face, 64.0).getlength(text) * size / 64.0
