"""Which option does an answer name? The rules of lmms-eval 0.7.3, benchmark by benchmark.

They differ from one benchmark to the next, and a score moves by points with the rule, so each keeps its own. (MMMU's goes back to
the evaluation of its authors, github.com/MMMU-Benchmark/MMMU; MMBench's to VLMEvalKit.) In one thing all
of them differ from lmms-eval here: nothing is drawn by chance. Where MMMU's rule draws an option at random for an answer that
names none, and MMBench's asks a second model (or draws), the answer counts as wrong.
"""

import re
import string
from collections.abc import Iterable, Sequence


def ai2d(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """AI2D: a letter with a full stop in front counts as the letter; the rest must be a letter but for case and punctuation."""
    found = re.match(r"\s*([A-Z])\.", prediction)
    given = found[1] if found else prediction.strip()
    return _is_one(given.lower().translate(_NO_PUNCTUATION), (answer.lower() for answer in answers))


def scienceqa(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """ScienceQA, as LLaVA reads it: the letter alone in either case, or a capital with a full stop in front."""
    text = prediction.strip()
    given = text[0] if len(text) > 1 and text[0].isupper() and text[1] == "." else text
    return _is_one(given.lower(), (answer.lower() for answer in answers))


def mmstar(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMStar: the likeliest of A to D by :func:`ranked_letter`. (Up to 0.5.0: the first character or "the answer is".)"""
    return _is_one(ranked_letter(prediction, "ABCD"), answers)


def mmbench(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMBench without a judge: one letter standing apart, else the one option whose text occurs, else :func:`ranked_letter`."""
    letters = string.ascii_uppercase[: len(options)] or "ABCD"
    given = (
        _letter_apart(prediction) or _text_inside(prediction, options) or ranked_letter(prediction, letters)
    )
    return _is_one(given, answers)


def mmmu(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMMU: an option's letter or, where there are no options, an answer that occurs in the decisive part of the text.

    Open answers were compared character by character up to lmms-eval 0.5.0, so that scores of that time are not comparable.
    """
    if options:
        return _is_one(_mmmu_letter(prediction, options), answers)
    said = [
        value
        for part in _decisive_parts(prediction)
        for text in (part, *_numbers(part))
        for value in _values(text)
    ]
    wanted = [value for answer in answers for value in _values(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return float(any(any(t in s for t in texts) if isinstance(s, str) else s in wanted for s in said))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _is_one(given: str | None, answers: Iterable[str]) -> float:
    return float(bool(given) and given in set(answers))


def _trim(text: str, marks: str) -> str:
    """Strip each mark once around, in the order given: a mark laid bare by a later one stays."""
    for mark in marks:
        text = text.strip(mark)
    return text


# How sure each form is that the letter is meant as the answer; the later place wins among equals.
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
_PHRASES = tuple(
    article + phrase + " is"
    for article in ("", "the ")
    for phrase in (
        "answer",
        "correct answer",
        "best answer",
        "correct option",
        "best option",
        "choice",
        "correct choice",
    )
) + ("i choose", "i select", "i pick", "my answer is", "my choice is")
_PHRASES += ("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")
_START, _END, _PHRASE = 10, 9, 7


def ranked_letter(text: str, letters: Iterable[str]) -> str | None:
    """The letter that ``text`` most likely names, among those allowed; ``None`` where none occurs.

    A letter standing first wins, then one standing last, then one after a phrase such as "the answer is", then ``(B)``, ``B.``,
    ``B:``, ``B)`` and ``B`` before a space; failing all of these, any capital that is one of the letters, even inside a word.
    """
    bare = _trim(text.strip(), ",.!?;:'\"")
    if not text.strip():
        return None
    padded = f" {bare} "
    lower, inner = padded.lower(), padded.strip()
    found: list[tuple[int, int, str]] = []
    for letter in letters:
        found += [(rank, padded.rfind(form.format(letter)), letter) for form, rank in _FORMS]
        starts = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
        found += [(_PHRASE, padded.find(letter, start), letter) for start in starts]
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((_START, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((_END, len(padded) - 1, letter))
    found = [each for each in found if each[1] >= 0] or [
        (0, padded.rfind(each), each) for each in letters if each in padded
    ]
    return max(found, key=lambda each: each[:2])[2] if found else None


# What may stand around a letter that stands apart, in the order in which MMBench tries them.
_AROUND = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def _letter_apart(text: str, letters: str = "ABCDE") -> str | None:
    """The one letter that is a word of the text; an A among more than three words may be an article."""
    words = text.split()
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, after in _AROUND:
        dressed = [letter for letter in letters if before + letter + after in words]
        if len(dressed) == 1:
            return dressed[0]
    return None


def _text_inside(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text occurs."""
    inside = [
        letter for letter, option in zip(string.ascii_uppercase, options) if option.lower() in text.lower()
    ]
    return inside[0] if len(inside) == 1 else None


def _mmmu_letter(text: str, options: Sequence[str]) -> str | None:
    """``(B)``, else ``B`` before a space, else ``B.``, else in a text of six words or more an option's text; the last wins."""
    text = f" {_trim(text, ',.!?;:' + chr(39))} "
    letters = string.ascii_uppercase[: len(options)]
    # the form by which a letter is found, and the form by whose last place several are told apart
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    named = [
        (lower.rfind(option.lower()), letter)
        for letter, option in zip(letters, options)
        if option.lower() in lower
    ]
    if named and len(text.split()) > 5:
        return max(named, key=lambda each: each[0])[1]
    return None


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _decisive_parts(text: str) -> list[str]:
    """What follows words such as "is" or "therefore" in each line (and, in the last one, "="); the whole text without any."""
    text = text.strip().strip(".").lower()
    lines, parts = text.split("\n"), []
    for number, line in enumerate(lines):
        keys = _KEYS + (("=",) if number == len(lines) - 1 else ())
        ends = [line.split(key)[-1].strip() for key in keys if key in line]
        shortest = ""
        for end in ends:  # an empty end gives way to the next, whatever its length
            if not shortest or len(end) < len(shortest):
                shortest = end
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            parts.append(shortest)
    return parts or [text]


_NUMBER_FORMS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # 1,234
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1.2e3
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # 12, 1.2, .5
)


def _numbers(text: str) -> list[str]:
    return [number for form in _NUMBER_FORMS for number in re.findall(form, text)]


def _values(text: str) -> list[str | float]:
    """A number to two places, or lower-case text; a single character only with a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
