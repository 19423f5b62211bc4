"""Images about shapes: colours, counts, places, diagrams, backgrounds."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokensel.book.mini.canvas import OPTION_LETTERS, PAPERS, QA, Box, Canvas, Page, paper, pick
from tokensel.book.mini.words import COLORS, SHAPES

BACKGROUNDS = ("plain", "stripes", "checks", "dots")


def choice(
    rng: np.random.Generator,
    question: str,
    answer: str,
    others: Sequence[str],
    category: str,
    spot: tuple[float, float] | None = None,
    evidence: Sequence[Box] = (),
) -> QA:
    """A multiple-choice question of four options in random order; the answer is its letter."""
    wrong = [str(other) for other in rng.permutation([other for other in others if other != answer])[:3]]
    options = [str(option) for option in rng.permutation([answer, *wrong])]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(OPTION_LETTERS, options))
    letter = OPTION_LETTERS[options.index(answer)]
    return QA(f"{question} {listed}", [letter], category, options, spot, list(evidence))


def scatter(rng: np.random.Generator, size: tuple[int, int], count: int, low=8.0, high=15.0) -> list[tuple]:
    """Up to ``count`` places (x, y, radius) whose shapes do not touch, from top to bottom."""
    spots: list[tuple[float, float, float]] = []
    for _ in range(100):
        if len(spots) == count:
            break
        radius = rng.uniform(low, high)
        y, x = (rng.uniform(radius + 2, side - radius - 2) for side in size)
        if all((x - a) ** 2 + (y - b) ** 2 > (radius + r + 4) ** 2 for a, b, r in spots):
            spots.append((x, y, radius))
    return sorted(spots, key=lambda spot: spot[1])


def thing_kinds(rng: np.random.Generator, count: int, unique: bool) -> list[tuple[str, str]]:
    """Shape and colour of each thing; with ``unique`` no shape and no colour comes twice."""
    if unique:
        return list(
            zip(map(str, rng.permutation(SHAPES)[:count]), map(str, rng.permutation(list(COLORS))[:count]))
        )
    return [(pick(rng, SHAPES), pick(rng, list(COLORS))) for _ in range(count)]


def tint(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255).tolist()
    return red, green, blue


def background_canvas(rng: np.random.Generator, size: tuple[int, int], kind: str | None = None) -> Canvas:
    kind = kind or pick(rng, PAPERS)
    return Canvas(paper(rng, size, kind), kind)


def exercises(canvas: Canvas) -> list[tuple[Any, ...]]:
    """Exercises about the shapes on ``canvas``: counts, and the places of those that occur once."""
    shapes = [(kind, x, y) for kind, x, y, _ in canvas.objects if kind in SHAPES]
    kinds = [kind for kind, _, _ in shapes]
    practice: list[tuple[Any, ...]] = [
        (f"how many are a {kind}?", str(kinds.count(kind))) for kind in sorted(set(kinds))
    ]
    alone = [(kind, x, y) for kind, x, y in shapes if kinds.count(kind) == 1]
    for kind, x, y in alone:
        down = "" if abs(y - canvas.height / 2) < 6 else "top" if y < canvas.height / 2 else "bottom"
        along = "" if abs(x - canvas.width / 2) < 6 else "left" if x < canvas.width / 2 else "right"
        practice.append((f"the {kind} is at the ?", f"{down} {along}".strip() or "no", canvas.spot(x, y)))
    for (kind, x, y), (other, a, b) in zip(alone, alone[1:] + alone[:1]):
        if abs(abs(x - a) - abs(y - b)) > 8:
            across = abs(x - a) > abs(y - b)
            answer = ("left of" if x < a else "right of") if across else ("above" if y < b else "below")
            practice.append((f"the {kind} is ? the {other}.", answer, canvas.spot(x, y, (a, b))))
    return practice


def attributes(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Shapes with a color and a place (mirrors GQA)."""
    canvas = background_canvas(rng, size)
    spots = scatter(rng, size, int(rng.integers(2, 5)))
    things = thing_kinds(rng, len(spots), unique=True)
    questions = []
    for (shape, color), (x, y, radius) in zip(things, spots):
        canvas.shape(shape, color, x, y, radius, tint(rng, color))
        spot, seen = canvas.spot(x, y), canvas.boxes[-1:]
        questions.append(QA(f"what color is the {shape}?", [color], "color", spot=spot, evidence=seen))
        questions.append(QA(f"which shape is {color}?", [shape], "shape", spot=spot, evidence=seen))
    for (shape, _), (x, y, _), box in zip(things, spots, canvas.boxes):
        for along, side, ends in (
            (x, canvas.width, ("left", "right")),
            (y, canvas.height, ("top", "bottom")),
        ):
            if abs(along - side / 2) > 6:
                asked = int(rng.integers(2))
                true = (along > side / 2) == bool(asked)
                question, answer = f"is the {shape} at the {ends[asked]}?", "yes" if true else "no"
                spot = canvas.spot(x, y)
                questions.append(QA(question, [answer], "place", spot=spot, evidence=[box]))
    first, second = (
        (int(place) for place in rng.choice(len(spots), 2, replace=False)) if len(spots) > 1 else (0, 0)
    )
    dx, dy = spots[first][0] - spots[second][0], spots[first][1] - spots[second][1]
    if max(abs(dx), abs(dy)) > 14 and abs(abs(dx) - abs(dy)) > 8:
        asked = pick(rng, ("left of", "right of") if abs(dx) > abs(dy) else ("above", "below"))
        true = {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[asked]
        question = f"is the {things[first][0]} {asked} the {things[second][0]}?"
        (x, y, _), (a, b, _) = spots[first], spots[second]
        spot = canvas.spot(x, y, (a, b))
        both = [canvas.boxes[first], canvas.boxes[second]]
        questions.append(QA(question, ["yes" if true else "no"], "relation", spot=spot, evidence=both))
    return canvas.finish(questions, exercises(canvas))


def science(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """How many there are of a shape, from one to four, by multiple choice (mirrors ScienceQA).

    Every count is equally likely and the options are always the same four: only the image tells.
    """
    canvas = background_canvas(rng, size)
    shape, *others = (str(shape) for shape in rng.permutation(SHAPES)[:3])
    count = int(rng.integers(1, 5))
    kinds = [shape] * count + others[: int(rng.integers(3))]
    spots = scatter(rng, size, len(kinds), 6.0, 9.0)
    if len(spots) < len(kinds):
        return canvas.finish([])  # too crowded: the caller draws the page again
    for kind, (x, y, radius) in zip(rng.permutation(kinds), spots):
        color = pick(rng, list(COLORS))
        canvas.shape(str(kind), color, x, y, radius, tint(rng, color))
    counted = [box for box, (kind, *_) in zip(canvas.boxes, canvas.objects) if kind == shape]
    asked = choice(
        rng, f"how many of these are a {shape}?", str(count), list("1234"), "counting", evidence=counted
    )
    return canvas.finish([asked], exercises(canvas))


def diagram(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A chain of shapes joined by arrows (mirrors AI2D)."""
    canvas = background_canvas(rng, size, pick(rng, ("plain", "gradient")))
    across = canvas.width >= canvas.height
    long, short = (canvas.width, canvas.height) if across else (canvas.height, canvas.width)
    count = int(rng.integers(2, 3 if long < 100 else 5))  # room for a shape and an arrow each
    things = thing_kinds(rng, count, unique=True)
    pitch = long / count
    radius = min(11.0, pitch / 2 - 7)
    forward, middle = bool(rng.integers(2)), rng.uniform(radius + 3, short - radius - 3)
    spots = []
    for place, (shape, color) in enumerate(things):
        along, beside = (
            (place + 0.5) * pitch,
            float(np.clip(middle + rng.uniform(-6, 6), radius + 2, short - radius - 2)),
        )
        spots.append((along, beside) if across else (beside, along))
        x, y = spots[-1]
        canvas.shape(shape, color, x, y, radius, tint(rng, color))
    for before, after in itertools.pairwise(spots):
        start, end = (before, after) if forward else (after, before)
        _arrow(canvas, start, end, radius + 2)
    way = 1 if forward else -1
    order = [(shape, *spot) for (shape, _), spot in zip(things, spots)][::way]
    canvas.chain, shapes, whole = order, list(SHAPES), canvas.boxes
    # two shapes that follow one another and the arrow between them
    links = [[whole[i], whole[i + 1], whole[count + i]] for i in range(count - 1)][::way]
    questions = []
    for ((shape, *here), (following, *there)), link in zip(itertools.pairwise(order), links):
        spot, asked = canvas.spot(*there), f"what comes after the {shape}?"
        questions.append(choice(rng, asked, following, shapes, "after", spot, link))
        spot, asked = canvas.spot(*here), f"what comes before the {following}?"
        questions.append(choice(rng, asked, shape, shapes, "before", spot, link))
    (first, *start), (last, *end) = order[0], order[-1]
    questions.append(choice(rng, "what comes first?", first, shapes, "first", canvas.spot(*start), whole))
    questions.append(choice(rng, "what comes last?", last, shapes, "last", canvas.spot(*end), whole))
    ends = ("left", "right") if across else ("top", "bottom")
    practice = [
        ("the first is at the ?", ends[not forward], canvas.spot(*start)),
        ("the last is at the ?", ends[forward], canvas.spot(*end)),
    ]
    return canvas.finish(questions, practice)


def _arrow(canvas: Canvas, start, end, gap: float) -> None:
    """A dark arrow from ``start`` to ``end``, ``gap`` pixels short of either, with a clear head."""
    start, end = np.array(start), np.array(end)
    way = (end - start) / np.linalg.norm(end - start)
    side, tail, tip = np.array([-way[1], way[0]]), start + way * gap, end - way * gap
    neck = tip - way * 7
    low, high = np.minimum(tail, tip), np.maximum(tail, tip)
    # the head is six pixels wide on either side
    canvas.mark(*(low - 6 * abs(side)), *(high + 6 * abs(side)))
    canvas.pen.line([*tail, *neck], fill=(40, 40, 40), width=3)
    canvas.pen.polygon([tuple(tip), tuple(neck + side * 6), tuple(neck - side * 6)], fill=(40, 40, 40))
    across = abs(way[0]) > abs(way[1])
    heading = ("right" if way[0] > 0 else "left") if across else ("down" if way[1] > 0 else "up")
    canvas.objects.append((f"arrow {heading}", *((tip + neck) / 2), 0))


def mixed(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Several abilities by multiple choice: background, extremes, total, place (mirrors MMStar)."""
    background = pick(rng, BACKGROUNDS)
    canvas = background_canvas(rng, size, background)
    spots = scatter(rng, size, int(rng.integers(2, 5)), 7.0, 9.0)
    big = int(rng.integers(len(spots)))
    things = thing_kinds(rng, len(spots), unique=True)
    for place, ((shape, color), (x, y, radius)) in enumerate(zip(things, spots)):
        canvas.shape(shape, color, x, y, radius * (1.55 if place == big else 1.0), tint(rng, color))
    shapes, colors = list(SHAPES), list(COLORS)
    top, bottom, largest = (canvas.spot(*spots[place][:2]) for place in (0, -1, big))
    seen, fine = canvas.boxes, "fine-grained perception"  # which is the largest, all of them tell
    many, place = "how many shapes are there?", "spatial reasoning"
    questions = [
        choice(rng, "what is the background?", background, list(BACKGROUNDS), "coarse perception"),
        choice(rng, "which shape is the largest?", things[big][0], shapes, fine, largest, seen),
        choice(rng, "what color is the largest shape?", things[big][1], colors, fine, largest, seen),
        choice(rng, many, str(len(spots)), list("12345"), "instance reasoning", evidence=seen),
        choice(rng, "which shape is at the top?", things[0][0], shapes, place, top, seen),
        choice(rng, "which shape is at the bottom?", things[-1][0], shapes, place, bottom, seen),
    ]
    return canvas.finish(questions, exercises(canvas))


def scene(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A scene to be described completely, from top to bottom."""
    canvas = background_canvas(rng, size)
    spots = scatter(rng, size, int(rng.integers(2, 6)), 7.0, 12.0)
    spots = [spot for place, spot in enumerate(spots) if place == 0 or spot[1] - spots[place - 1][1] > 6]
    things = thing_kinds(rng, len(spots), unique=False)
    for (shape, color), (x, y, radius) in zip(things, spots):
        canvas.shape(shape, color, x, y, radius, tint(rng, color))
    listed = ", ".join(f"{color} {shape}" for shape, color in things)
    asked = QA("describe the scene.", [listed], "scene", evidence=canvas.boxes)
    return canvas.finish([asked], exercises(canvas))
