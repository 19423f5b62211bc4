"""Images with large things, and pages whose evidence is from one token to half of the page.

Things of the other general tasks are as large as a word. Those of GQA and MMStar take up a good part of the
photograph, so a random choice of tokens meets them. Here they do, too: 5 to 25 % of the page.
"""

import numpy as np
from PIL import Image

from tokensel.book.mini.canvas import (
    FONTS,
    PATCH,
    QA,
    SIZES,
    Canvas,
    Page,
    dark_color,
    paper,
    pattern,
    pick,
)
from tokensel.book.mini.general import (
    BACKGROUNDS,
    background_canvas,
    choice,
    exercises,
    scatter,
    thing_kinds,
    tint,
)
from tokensel.book.mini.words import COLORS, LETTERS, SHAPES, belongs, word

SHARE = (0.05, 0.25)  # of the page, that a large thing takes up with its box
SCENES = ("page", "bar", "shapes", "sign")
MOST_LETTERS = 40


def _radii(size: tuple[int, int], share: tuple[float, float] = SHARE) -> tuple[float, float]:
    """Half of the side of a square that takes up the least and the most of these shares of a page."""
    least, most = (float(np.sqrt(part * size[0] * size[1])) / 2 for part in share)
    return least, min(most, min(size) / 2 - 3)


def objects(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Large shapes: what colour is one, which one has a colour (mirrors GQA)."""
    canvas = background_canvas(rng, size)
    spots = scatter(rng, size, int(rng.integers(1, 4)), *_radii(size))
    questions = []
    for (shape, color), (x, y, radius) in zip(thing_kinds(rng, len(spots), unique=True), spots):
        canvas.shape(shape, color, x, y, radius, tint(rng, color))
        spot, seen = canvas.spot(x, y), canvas.boxes[-1:]
        questions.append(QA(f"what color is the {shape}?", [color], "color", spot=spot, evidence=seen))
        questions.append(QA(f"which shape is {color}?", [shape], "shape", spot=spot, evidence=seen))
    return canvas.finish(questions, exercises(canvas))


def patterns(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Large signs without text: which pattern does the one of a colour have (mirrors MMStar)?"""
    canvas = background_canvas(rng, size, pick(rng, ("plain", "gradient", "grain")))
    spots = scatter(rng, size, int(rng.integers(1, 3)), *_radii(size, (0.08, 0.25)))
    colors = [str(color) for color in rng.permutation(list(COLORS))[: len(spots)]]
    questions, kinds = [], [pick(rng, BACKGROUNDS) for _ in spots]
    for color, kind, (x, y, radius) in zip(colors, kinds, spots):
        left, top, side = round(x - radius), round(y - radius), round(2 * radius)
        canvas.panel((left, top, left + side - 1, top + side - 1), color, tint(rng, color))
        if kind != "plain":
            marks = Image.fromarray(255 * pattern(rng, kind, (side, side)).astype(np.uint8))
            canvas.image.paste((235, 235, 235), (left, top), marks)
        asked = f"what is the {color} sign?"
        questions.append(QA(asked, [kind], kind, spot=canvas.spot(x, y), evidence=canvas.boxes[-1:]))
    return canvas.finish(questions)


def larger(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """The larger of two large shapes, by multiple choice (mirrors MMStar)."""
    canvas = background_canvas(rng, size)
    spots = scatter(rng, size, 2, *_radii(size, (0.03, 0.18)))
    if len(spots) < 2 or max(a := spots[0][2], b := spots[1][2]) < 1.3 * min(a, b):
        return canvas.finish([])  # too crowded, or too alike: the caller draws the page again
    things = thing_kinds(rng, 2, unique=True)
    for (shape, color), (x, y, radius) in zip(things, spots):
        canvas.shape(shape, color, x, y, radius, tint(rng, color))
    (shape, color), (x, y, _) = max(zip(things, spots), key=lambda thing: thing[1][2])
    spot, seen = canvas.spot(x, y), canvas.boxes
    questions = [
        choice(rng, "which shape is the largest?", shape, list(SHAPES), "shape", spot, seen),
        choice(rng, "what color is the largest shape?", color, list(COLORS), "color", spot, seen),
    ]
    return canvas.finish(questions, exercises(canvas))


def scenes(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """What the scene is: a page of text, a bar chart, shapes, or a sign (mirrors MMStar)."""
    kind = pick(rng, SCENES)
    canvas = Canvas(paper(rng, size, pick(rng, ("plain", "gradient", "grain", "stripes", "checks"))))
    colors = [str(color) for color in rng.permutation(list(COLORS))]
    font, type_size = pick(rng, FONTS), pick(rng, SIZES)
    if kind == "shapes":
        for (shape, color), (x, y, radius) in zip(
            thing_kinds(rng, 6, unique=True), scatter(rng, size, int(rng.integers(4, 7)), 6.0, 10.0)
        ):
            canvas.shape(shape, color, x, y, radius, tint(rng, color))
    elif kind == "sign":
        ((x, y, radius),) = scatter(rng, size, 1, *_radii(size, (0.08, 0.25)))
        canvas.panel(tuple(map(round, (x - radius, y - radius, x + radius, y + radius))), colors[0])
    else:
        left, row = int(rng.integers(3, 10)), type_size[1] + int(rng.integers(4, 9))
        first = int(rng.integers(3, 9))
        for color, top in zip(colors[: int(rng.integers(3, 6))], range(first, size[0] - row, row)):
            if kind == "bar":
                end = left + int(rng.uniform(0.2, 0.9) * (size[1] - left))
                canvas.panel((left, top, end, top + type_size[1] - 2), color)
            else:
                canvas.text(left, top, word(rng, split, 3, 5), font, type_size, dark_color(rng))
    asked = "what is the scene?"
    return canvas.finish([choice(rng, asked, kind, list(SCENES), kind, evidence=canvas.boxes)])


def spots(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """One shape, from a dot of one token to half of the page: what colour is it? Any part of it tells."""
    canvas = background_canvas(rng, size)
    least, most = 0.4 * PATCH, _radii(size, (0.0, 0.5))[1]
    radius = float(np.exp(rng.uniform(np.log(least), np.log(most))))  # as many small ones as large ones
    y, x = (rng.uniform(radius + 2, side - radius - 2) for side in size)
    shape, color = pick(rng, SHAPES), pick(rng, list(COLORS))
    canvas.shape(shape, color, x, y, radius, tint(rng, color))
    asked = f"what color is the {shape}?"
    return canvas.finish([QA(asked, [color], "color", spot=canvas.spot(x, y), evidence=canvas.boxes)])


def strings(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Random letters, from one to dozens: all of them have to be read."""
    canvas = Canvas(paper(rng, size, pick(rng, ("plain", "gradient", "grain"))))
    font, (advance, points), dark = pick(rng, FONTS), pick(rng, SIZES), dark_color(rng)
    count = int(np.exp(rng.uniform(0, np.log(MOST_LETTERS + 1))))
    room = min(6, canvas.width // advance - 2)
    written: list[str] = []
    top = int(rng.integers(2, max(3, canvas.height - points * (2 + count // room))))
    while count > 0:
        snapped = canvas.snap_y(top, points)
        top = snapped if snapped >= top else canvas.snap_y(top + points // 2, points)  # never upwards
        if top + points > canvas.height:
            break
        length = min(count, room)
        text = ""
        while not text or not belongs(text, split):
            text = "".join(LETTERS[int(place)] for place in rng.integers(len(LETTERS), size=length))
        left = int(rng.integers(2, canvas.width - advance * (length + 1)))
        canvas.text(left, top, text, font, (advance, points), dark)
        written.append(text)
        count, top = count - length, top + points + int(rng.integers(2, 6))
    return canvas.finish([QA("transcribe the page.", [" ".join(written)], "page", evidence=canvas.boxes)])
