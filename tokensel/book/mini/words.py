"""The words and numbers on the images; no test word of four letters or more occurs in training."""

import zlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np

# O and I are left out, as on number plates: in many fonts they cannot be told from 0 and 1.
CONSONANTS = "BCDFGHJKLMNPRSTVWXYZ"
VOWELS = "AEU"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = "0123456789"
ALPHABET = LETTERS + DIGITS

# one word a line would fill the page, so the formatter leaves these two lists alone
FIELDS = [
    "NAME", "DATE", "AREA", "TEAM", "DESK", "GATE", "SEAT", "RATE", "PAGE", "PLAN", "CREW", "BANK",
    "PART", "RENT", "FEE", "TAX", "AGE", "REF", "DEPT", "HALL", "LANE", "YEAR", "WEEK", "DAY",
]  # fmt: skip
TITLES = [
    "MENU", "SALE", "NEWS", "FARM", "PARK", "TEA", "BAR", "CAFE", "GAME", "DANCE", "CHESS", "MATCH",
]  # fmt: skip

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (205, 35, 40),
    "green": (35, 140, 55),
    "blue": (40, 75, 200),
    "yellow": (235, 200, 30),
    "purple": (130, 45, 150),
    "orange": (240, 125, 25),
    "black": (25, 25, 25),
}

SPLITS = ("train", "validation", "test")


def belongs(text: str, split: str) -> bool:
    """Whether ``text`` may be an answer in ``split``: a tenth each for validation and test, by checksum.

    Texts of up to three characters belong to every split. There are so few of them that a model would learn
    which ones never occur in training.
    """
    slot = zlib.crc32(text.encode()) % 10
    return len(text) <= 3 or split == ("test" if slot < 1 else "validation" if slot < 2 else "train")


def word(rng: np.random.Generator, split: str, low: int = 3, high: int = 5) -> str:
    """A pronounceable capital word of ``low`` to ``high`` letters that belongs to ``split``."""
    while True:
        length, vowel = int(rng.integers(low, high + 1)), int(rng.integers(2))
        text = "".join(
            (VOWELS if (place + vowel) % 2 else CONSONANTS)[
                int(rng.integers(3 if (place + vowel) % 2 else 20))
            ]
            for place in range(length)
        )
        if belongs(text, split) and text not in FIELDS and text not in TITLES:
            return text


def nonsense(like: str, split: str) -> str:
    """Random letters, as many as ``like`` has and decided by it, that belong to ``split`` and are no word.

    In a :func:`word` vowels and consonants take turns; here, somewhere, two of a kind stand side by side.
    """
    rng = np.random.default_rng([zlib.crc32(b"nonsense"), zlib.crc32(like.encode())])
    while True:
        text = "".join(LETTERS[int(place)] for place in rng.integers(len(LETTERS), size=len(like)))
        kinds = [letter in VOWELS for letter in text]
        if any(one == two for one, two in pairwise(kinds)) and belongs(text, split):
            return text


def number(rng: np.random.Generator, split: str, low: int = 2, high: int = 4) -> str:
    """A number of ``low`` to ``high`` digits, no leading zero, that belongs to ``split``."""
    while True:
        digits = int(rng.integers(low, high + 1))
        text = str(int(rng.integers(10 ** (digits - 1), 10**digits)))
        if belongs(text, split):
            return text


def distinct(
    rng: np.random.Generator, count: int, generate: Callable[[np.random.Generator], str]
) -> list[str]:
    """``count`` different texts from ``generate(rng)``."""
    texts: dict[str, None] = {}  # keeps the order, which a set would not
    while len(texts) < count:
        texts[generate(rng)] = None
    return list(texts)
