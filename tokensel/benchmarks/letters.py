"""Which option does an answer name? The rules of lmms-eval 0.7.3, benchmark by benchmark.

They differ from one benchmark to the next, and a score changes by points with the rule, so each keeps its
own. (MMMU's comes from its authors' evaluation, github.com/MMMU-Benchmark/MMMU; MMBench's from VLMEvalKit.)
All of them differ from lmms-eval in one respect: no option is drawn at random. Where an answer names no
option, MMMU's rule draws one at random and MMBench's asks a second model (or draws); here the answer is
wrong.
"""

import re
import string
from collections.abc import Iterable, Sequence


def ai2d(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """AI2D: a letter with a full stop at the start, or one letter alone but for case and punctuation."""
    match = re.match(r"\s*([A-Z])\.", prediction)
    given = match[1] if match else prediction.strip()
    return _is_one(given.lower().translate(_NO_PUNCTUATION), (answer.lower() for answer in answers))


def scienceqa(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """ScienceQA, as LLaVA reads it: a letter in either case, or a capital with a full stop at the start."""
    text = prediction.strip()
    given = text[0] if len(text) > 1 and text[0].isupper() and text[1] == "." else text
    return _is_one(given.lower(), (answer.lower() for answer in answers))


def mmstar(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMStar: the likeliest of A to D by :func:`ranked_letter`."""
    return _is_one(ranked_letter(prediction, "ABCD"), answers)


def mmbench(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMBench without a judge model.

    The only letter that is a word, else the only option whose text occurs, else :func:`ranked_letter`.
    """
    letters = string.ascii_uppercase[: len(options)] or "ABCD"
    given = (
        _letter_apart(prediction) or _text_inside(prediction, options) or ranked_letter(prediction, letters)
    )
    return _is_one(given, answers)


def mmmu(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """MMMU: an option's letter or, without options, an answer that occurs in the decisive part of the text.

    Up to lmms-eval 0.5.0 open answers were compared character by character; those scores are not comparable.
    """
    if options:
        return _is_one(_mmmu_letter(prediction, options), answers)
    parts = [text for part in _decisive_parts(prediction) for text in (part, *_numbers(part))]
    given = [value for text in parts for value in _values(text)]
    wanted = [value for answer in answers for value in _values(answer)]
    texts = [value for value in wanted if isinstance(value, str)]
    return float(any(any(t in g for t in texts) if isinstance(g, str) else g in wanted for g in given))


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _is_one(given: str | None, answers: Iterable[str]) -> float:
    return float(bool(given) and given in set(answers))


def _trim(text: str, marks: str) -> str:
    """Strip the marks one after the other: a mark that only a later one uncovers stays."""
    for mark in marks:
        text = text.strip(mark)
    return text


# The forms of an answer with their ranks: the higher rank wins, among equal ranks the later position.
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
)
_PHRASES += ("i choose", "i select", "i pick", "my answer is", "my choice is")
_PHRASES += ("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは")
_START, _END, _PHRASE = 10, 9, 7


def ranked_letter(text: str, letters: Iterable[str]) -> str | None:
    """The letter that ``text`` most likely names, among those allowed; ``None`` where none occurs.

    A letter at the start wins, then one at the end, then one after a phrase such as "the answer is", then
    ``(B)``, ``B.``, ``B:``, ``B)`` and ``B`` before a space; failing all of these, any capital that is one of
    the letters, even in a word.
    """
    bare = _trim(text.strip(), ",.!?;:'\"")
    if not text.strip():
        return None
    padded = f" {bare} "
    lower, inner = padded.lower(), padded.strip()
    matches: list[tuple[int, int, str]] = []  # rank, position, letter
    for letter in letters:
        matches += [(rank, padded.rfind(form.format(letter)), letter) for form, rank in _FORMS]
        starts = [lower.find(phrase) + len(phrase) for phrase in _PHRASES if phrase in lower]
        matches += [(_PHRASE, padded.find(letter, start), letter) for start in starts]
        if inner.startswith(letter) and not inner[1:2].isalpha():
            matches.append((_START, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            matches.append((_END, len(padded) - 1, letter))
    matches = [match for match in matches if match[1] >= 0] or [
        (0, padded.rfind(letter), letter) for letter in letters if letter in padded
    ]
    return max(matches, key=lambda match: match[:2])[2] if matches else None


# What may surround a letter that is apart from words, in the order in which MMBench tries them.
_AROUND = (
    *(("", after) for after in (".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)


def _letter_apart(text: str, letters: str = "ABCDE") -> str | None:
    """The only letter that is a word of the text; an A among more than three words may be an article."""
    words = text.split()
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, after in _AROUND:
        surrounded = [letter for letter in letters if before + letter + after in words]
        if len(surrounded) == 1:
            return surrounded[0]
    return None


def _text_inside(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option whose text occurs."""
    inside = [
        letter for letter, option in zip(string.ascii_uppercase, options) if option.lower() in text.lower()
    ]
    return inside[0] if len(inside) == 1 else None


def _mmmu_letter(text: str, options: Sequence[str]) -> str | None:
    """``(B)``, else ``B`` before a space, else ``B.``, else an option's text in a text of six words or more.

    Among several matches the last one wins.
    """
    text = f" {_trim(text, ',.!?;:' + chr(39))} "
    letters = string.ascii_uppercase[: len(options)]
    # the form in which a letter is found, and the form whose last position decides between several
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        matches = [letter for letter in letters if form.format(letter) in text]
        if matches:
            return max(matches, key=lambda letter: text.rfind(place.format(letter)))
    lower = text.lower()
    named = [
        (lower.rfind(option.lower()), letter)
        for letter, option in zip(letters, options)
        if option.lower() in lower
    ]
    if named and len(text.split()) > 5:
        return max(named, key=lambda pair: pair[0])[1]
    return None


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def _decisive_parts(text: str) -> list[str]:
    """What follows "is", "therefore" and the like in each line (in the last also "="), else all."""
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
