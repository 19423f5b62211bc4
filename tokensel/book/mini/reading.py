"""Images of text: forms, charts, posters, words in a scene, and pages of text."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tokensel.book.mini.canvas import FONTS, QA, SIZES, Canvas, Page, dark_color, paper, pick
from tokensel.book.mini.words import ALPHABET, COLORS, FIELDS, TITLES, distinct, nonsense, number, word

Value = Callable[[np.random.Generator, str, int], str]

FULL = 64  # characters of a full page, spaces included; the other pages of text have 41 at most


def _value(rng: np.random.Generator, split: str, room: int) -> str:
    """A word or a number of at most ``room`` characters."""
    if rng.random() < 0.5:
        return word(rng, split, 3, min(room, 5))
    return number(rng, split, 2, min(room, 4))


def _word(rng: np.random.Generator, split: str, room: int) -> str:
    """A word of at most ``room`` characters."""
    return word(rng, split, 3, min(room, 5))


def _nonsense(rng: np.random.Generator, split: str, room: int) -> str:
    """Random letters in place of the word that :func:`_word` draws; ``rng`` moves on as it does there."""
    return nonsense(_word(rng, split, room), split)


def _lines(
    rng: np.random.Generator, height: int, step: int, most: int, start: int | None = None
) -> list[int]:
    """The tops of up to ``most`` lines of text, ``step`` pixels apart; some lines stay blank."""
    first = int(rng.integers(3, 9)) if start is None else start
    rows = list(range(first, height - step + 3, step))
    count = min(len(rows), int(rng.integers(2, most + 1)))
    return sorted(int(row) for row in rng.choice(rows, count, replace=False))


def _clutter(rng: np.random.Generator, canvas: Canvas, most: int = 3) -> None:
    """Rules and frames, faint enough to leave the text legible."""
    for _ in range(int(rng.integers(most + 1))):
        shade = tuple(int(value) for value in rng.integers(150, 200, 3))
        x, y = int(rng.integers(canvas.width)), int(rng.integers(canvas.height))
        kind = rng.integers(3)
        if kind == 0:
            canvas.pen.line((0, y, canvas.width, y), fill=shade)
        elif kind == 1:
            canvas.pen.line((x, 0, x, canvas.height), fill=shade)
        else:
            canvas.pen.rectangle(
                (x, y, x + int(rng.integers(10, 60)), y + int(rng.integers(10, 60))), outline=shade
            )


def form(rng: np.random.Generator, split: str, size: tuple[int, int], draw_value: Value = _value) -> Page:
    """A form: field names with their values beside or below them (mirrors DocVQA)."""
    canvas = Canvas(paper(rng, size))
    _clutter(rng, canvas)
    font, value_font, (advance, points) = pick(rng, FONTS), pick(rng, FONTS), pick(rng, SIZES)
    narrow = canvas.width < 100  # only the shortest field names leave room for a value beside them
    stacked = rng.random() < (0.5 if narrow else 0.2)
    if narrow and not stacked:
        advance, points = pick(rng, SIZES[:2])
    margin, dark = int(rng.integers(2, 3 if narrow else 7)), dark_color(rng)
    step = 2 * points + 6 if stacked else points + int(rng.integers(3, 8))
    tops = _lines(rng, canvas.height, step, 3 if stacked else 6)
    fields = [field for field in FIELDS if len(field) == 3] if narrow and not stacked else FIELDS
    keys = [str(key) for key in rng.choice(fields, min(len(tops), len(fields)), replace=False)]
    column = margin + advance * (max(map(len, keys)) + 1) + int(rng.integers(0, 3 if narrow else 12))
    questions, practice, floor = [], [], -1
    for key, top in zip(keys, tops):
        top = canvas.snap_y(max(top, floor), points)
        if top + points > canvas.height:
            break
        if not stacked:
            room = (canvas.width - column - 2) // advance
            value = draw_value(rng, split, room)
            canvas.text(margin, top, key, font, (advance, points), dark)
            canvas.text(column, top, value, value_font, (advance, points), dark_color(rng))
            floor = top + points + 1
        else:
            value = draw_value(rng, split, min(5, (canvas.width - margin - 6) // advance))
            below = canvas.snap_y(top + points + 1, points)
            if below + points > canvas.height:
                break
            canvas.text(margin, top, key, font, (advance, points), dark)
            canvas.text(
                margin + int(rng.integers(0, 5)), below, value, value_font, (advance, points), dark_color(rng)
            )
            floor = below + points + 2
        kind, seen = "stacked" if stacked else "inline", canvas.boxes[-2:]  # field name and value
        questions.append(QA(f"what is the {key}?", [value], kind, evidence=seen))
        practice.append((f"what is {value}?", key))
    return canvas.finish(questions, practice)


def word_form(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A form of which every value is a word."""
    return form(rng, split, size, _word)


def nonsense_form(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """The same form, with random letters in place of each word."""
    return form(rng, split, size, _nonsense)


def chart(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A bar chart: labels, coloured bars and their values in figures (mirrors ChartQA)."""
    canvas = Canvas(paper(rng, size, "plain"))
    font, (advance, points) = pick(rng, FONTS), pick(rng, SIZES[:4])
    step = points + int(rng.integers(3, 9))
    tops = _lines(rng, canvas.height, step, 5)
    room = 2 if canvas.width < 100 else 3  # characters of a label and of a value
    labels = distinct(rng, len(tops), lambda r: word(r, split, 2, room))
    colors = [str(color) for color in rng.permutation(list(COLORS))[: len(tops)]]
    left, gap = (
        int(rng.integers(2, 5)) + room * advance + 3,
        3 + advance // 2,
    )  # a value may be set half a letter back
    reach = canvas.width - left - gap - room * advance - 1
    values = [number(rng, split, 1, room) for _ in tops]
    most = max(int(value) for value in values)
    canvas.pen.line((left, 0, left, canvas.height), fill=(90, 90, 90))
    questions, practice, floor = [], [], -1
    for label, color, value, top in zip(labels, colors, values, tops):
        top = canvas.snap_y(max(top, floor), points)
        if top + points > canvas.height:
            break
        floor = top + points + 1
        length = max(9, round(reach * int(value) / most))
        canvas.text(left - 3 - len(label) * advance, top, label, font, (advance, points), (30, 30, 30))
        canvas.panel((left + 1, top + 2, left + length, top + points - 2), color)
        canvas.text(left + length + gap, top, value, font, (advance, points), (30, 30, 30))
        name, bar, figures = canvas.boxes[-3:]
        questions.append(QA(f"what is the value of {label}?", [value], "label", evidence=[name, figures]))
        asked = f"what is the value of the {color} bar?"
        questions.append(QA(asked, [value], "color", evidence=[bar, figures]))
        practice += [(f"what color is {label}?", color), (f"what is the {color} bar?", label)]
    return canvas.finish(questions, practice)


def poster(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A poster of several blocks, each a coloured heading over a line of text (mirrors InfoVQA)."""
    canvas = Canvas(paper(rng, size))
    font, body, (advance, points) = pick(rng, FONTS), pick(rng, FONTS), pick(rng, SIZES[:5])
    rows, columns = max(1, canvas.height // 48), max(1, canvas.width // 56)
    spots = [(row, column) for row in range(rows) for column in range(columns)]
    rng.shuffle(spots)
    spots = sorted(map(tuple, spots[: max(1, int(rng.integers(len(spots) // 2, len(spots) + 1)))]))
    titles = [str(title) for title in rng.choice(TITLES, len(spots), replace=False)]
    colors = [str(color) for color in rng.permutation(list(COLORS))[: len(spots)]]
    questions, practice, cell = [], [], (canvas.height // rows, canvas.width // columns)
    for (row, column), title, color in zip(spots, titles, colors):
        y = canvas.snap_y(row * cell[0] + int(rng.integers(1, 5)), points + 3)
        below = canvas.snap_y(y + points + 4, points)
        if below + points > canvas.height:
            continue
        x = column * cell[1] + int(rng.integers(1, 4))
        end = min(x + advance * 5 + 4, canvas.width)
        canvas.panel((x, y, end, y + points + 1), color)
        light = color in ("yellow", "orange")
        canvas.text(x + 2, y + 1, title, font, (advance, points), (20, 20, 20) if light else (250, 250, 250))
        value = _value(rng, split, 5)
        canvas.text(x + 2, below, value, body, (advance, points), dark_color(rng))
        panel, heading, line = canvas.boxes[-3:]
        questions.append(QA(f"what is under {title}?", [value], "title", evidence=[heading, line]))
        asked = f"what is under the {color} heading?"
        questions.append(QA(asked, [value], "color", evidence=[panel, line]))
        practice += [(f"what color is {title}?", color), (f"what is the {color} heading?", title)]
        practice.append((f"what is above {value}?", title))
    return canvas.finish(questions, practice)


def scene_text(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """Words on coloured signs over a texture (mirrors TextVQA)."""
    canvas = Canvas(
        paper(rng, size, pick(rng, ("stripes", "checks", "dots", "grain"))) * rng.uniform(0.75, 1.0)
    )
    count = int(rng.integers(1, 4))
    colors = [str(color) for color in rng.permutation(list(COLORS))[:count]]
    questions, practice, floor = [], [], int(rng.integers(2, 20))
    for color in colors:
        font, (advance, points) = pick(rng, FONTS), pick(rng, SIZES)
        value = _value(rng, split, 5)
        y = canvas.snap_y(floor + 3, points)
        if y + points + 3 > canvas.height:
            break
        width = advance * len(value)
        x = int(rng.integers(3, canvas.width - width - 5))
        canvas.panel((x - 3, y - 2, x + width + 3, y + points + 1), color)
        light = color in ("yellow", "orange")
        canvas.text(x, y, value, font, (advance, points), (20, 20, 20) if light else (250, 250, 250))
        floor = y + points + int(rng.integers(4, 24))
        asked, sign = f"what does the {color} sign say?", canvas.boxes[-2:]  # panel and text
        questions.append(QA(asked, [value], "color", evidence=sign))
        practice.append((f"what color is {value}?", color))
    if len(questions) == 1:
        only = questions[0]
        questions.append(QA("what does the sign say?", only.answers, "single", evidence=only.evidence))
    return canvas.finish(questions, practice)


def text_page(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A page of short lines to be transcribed completely."""
    canvas = Canvas(paper(rng, size))
    _clutter(rng, canvas, 1)
    font, (advance, points), dark = pick(rng, FONTS), pick(rng, SIZES), dark_color(rng)
    tops, written, floor = _lines(rng, canvas.height, points + int(rng.integers(3, 8)), 4), [], -1
    for top in tops:
        top = canvas.snap_y(max(top, floor), points)
        x = int(rng.integers(2, 12))
        while top + points <= canvas.height and x + 3 * advance + 2 <= canvas.width:
            value = _value(rng, split, min(5, (canvas.width - x - 2) // advance))
            x, _ = canvas.text(x, top, value, font, (advance, points), dark)
            written.append(value)
            x += advance + int(rng.integers(0, 16))
            if rng.random() < 0.4:
                break
        floor = top + points + 1
    practice = [("what comes first?", written[0]), ("what comes last?", written[-1])] if written else []
    for before, after in pairwise(written):
        practice += [(f"what comes after {before}?", after), (f"what comes before {after}?", before)]
    asked = QA("transcribe the page.", [" ".join(written)], "page", evidence=canvas.boxes)
    return canvas.finish([asked], practice)


def full_page(rng: np.random.Generator, split: str, size: tuple[int, int]) -> Page:
    """A page with ``FULL`` characters or more to be transcribed; one too small for them asks nothing."""
    canvas = Canvas(paper(rng, size))
    font, (advance, points), dark = pick(rng, FONTS), pick(rng, SIZES[:3]), dark_color(rng)
    written, floor = [], int(rng.integers(2, 6))
    while True:
        top = canvas.snap_y(floor, points)
        top += points if top < floor else 0  # into the line above: start at the tile border instead
        if top + points > canvas.height:
            break
        x = int(rng.integers(2, 8))
        while x + 3 * advance + 2 <= canvas.width and len(" ".join(written)) < FULL:
            value = _value(rng, split, min(5, (canvas.width - x - 2) // advance))
            x, _ = canvas.text(x, top, value, font, (advance, points), dark)
            written.append(value)
            x += advance + int(rng.integers(0, 4))
        floor = top + points + int(rng.integers(2, 5))
    text = " ".join(written)
    asked = QA("transcribe the page.", [text], "page", evidence=canvas.boxes)
    return canvas.finish([asked] if len(text) >= FULL else [])


def print_page(rng: np.random.Generator, size: tuple[int, int]) -> Page:
    """A page full of random text for learning letters; each line has its own font, size and colors."""
    canvas = Canvas(paper(rng, size, pick(rng, ("plain", "gradient", "grain", "stripes", "checks", "dots"))))
    y = int(rng.integers(0, 5))
    while True:
        font, (advance, points) = pick(rng, FONTS), pick(rng, SIZES)
        y = canvas.snap_y(y, points)
        if y + points > canvas.height:
            return canvas.finish([])
        x, pen = int(rng.integers(0, 8)), dark_color(rng)
        while (room := (canvas.width - x) // advance) >= 2:
            length = min(room, int(rng.integers(2, 7)))
            text = "".join(ALPHABET[int(place)] for place in rng.integers(len(ALPHABET), size=length))
            if rng.random() < 0.3:
                color = pick(rng, list(COLORS))
                canvas.panel((x, y - 1, min(x + advance * (length + 1), canvas.width) - 3, y + points), color)
                pen = (20, 20, 20) if color in ("yellow", "orange") else (250, 250, 250)
            x, _ = canvas.text(x, y, text, font, (advance, points), pen)
            x, pen = x + advance + int(rng.integers(0, 8)), dark_color(rng)
        y += points + int(rng.integers(1, 7))
