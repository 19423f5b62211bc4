"""Metrics: one function each, from 0 (wrong) to 1 (right).

Every metric has the signature ``metric(prediction, answers, options=())``: the generated text, the answers
that count as right, and the options of a multiple-choice question. The first five follow lmms-eval, so that
numbers can be compared with published ones, and so do the letter rules of the benchmarks. ``option_letter``
is a rule of this library; ``similarity`` and ``item_f1`` score long answers.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from tokensel.benchmarks import letters
from tokensel.utils.errors import needs

Metric = Callable[..., float]


def anls(
    prediction: str, answers: Sequence[str], options: Sequence[str] = (), threshold: float = 0.5
) -> float:
    """Average normalised Levenshtein similarity of one question (DocVQA, InfographicVQA).

    Case and runs of white space are ignored. A similarity below ``threshold`` counts as 0: such an answer is
    not a misreading but a different answer. As in lmms-eval the distance is divided by the longer *raw*
    length.
    """
    return _floor(max((_anls_one(prediction, answer) for answer in answers), default=0.0), threshold)


def _anls_one(prediction: str, answer: str) -> float:
    with needs("eval"):
        from rapidfuzz.distance import Levenshtein

    length = max(len(prediction), len(answer))
    return 1.0 - Levenshtein.distance(_plain(prediction), _plain(answer)) / length if length else 1.0


def _floor(value: float, threshold: float) -> float:
    return value if value >= threshold else 0.0


def relaxed_accuracy(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """ChartQA's metric: a number may miss by 5 % of the answer, any other text must be equal but for case.

    ``12%`` is read as 0.12 on either side. An answer of exactly 0 has no 5 %, and is compared as text.
    """
    return float(any(_relaxed_one(prediction.strip(), answer.strip()) for answer in answers))


def _relaxed_one(prediction: str, answer: str, tolerance: float = 0.05) -> bool:
    given, wanted = _number(prediction), _number(answer)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None  # "nan" and "infinity" are words here


def vqa_accuracy(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """VQA accuracy (TextVQA): how many of ten people gave this answer, three being enough.

    Both sides pass :func:`normalize_vqa`. Each person is left out in turn, and ``min(1, matches among the
    others / 3)`` is averaged. With fewer than four answers no three others exist: there any equal answer
    scores 1.
    """
    given = normalize_vqa(prediction)
    equal = [normalize_vqa(answer) == given for answer in answers]
    if len(equal) < 4:
        return float(any(equal))
    matches = sum(equal)
    return sum(min(1.0, (matches - match) / 3) for match in equal) / len(equal)


# With their apostrophe; the answer "dont" is read as "don't". This is the list of the VQA evaluation, which
# leaves out "im" and "wed", since these are words as well.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
    there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've
    wouldn't y'all you'd you'll you're you've
"""
_DOUBLE_CONTRACTIONS = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_NUMBER_WORDS.split())}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _spellings() -> dict[str, str]:
    """Each spelling with one apostrophe missing -> the full spelling."""
    table = {"somebody'd": "somebodyd"}  # a mistake of the original, kept so that scores agree
    for full in (_CONTRACTIONS + _DOUBLE_CONTRACTIONS).split():
        table |= {full[:i] + full[i + 1 :]: full for i, letter in enumerate(full) if letter == "'"}
    return table


_SPELLINGS = _spellings()


def normalize_vqa(text: str) -> str:
    """The answer normalisation of the VQA evaluation server (EvalAI), as lmms-eval applies it.

    To lower case; remove punctuation (next to a space it is deleted, inside a word it becomes a space);
    remove full stops unless a digit follows; number words to digits; remove articles; restore apostrophes in
    contractions.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space else " ")
    words = (_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", out).split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the prediction equals an answer, ignoring case, punctuation and outer white space (GQA)."""
    given, *wanted = (text.strip().lower().translate(_NO_PUNCTUATION) for text in (prediction, *answers))
    return float(given in wanted)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def option_letter(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the option that the prediction names is an answer; more lenient than the benchmarks' own rules.

    An answer may be a letter or the text of an option. A prediction without a recognised option
    scores 0; nothing is drawn at random.
    """
    given = parse_option(prediction, options)
    return float(given is not None and any(parse_option(answer, options) == given for answer in answers))


_LETTER_FIRST = re.compile(r"\(?([A-Z])(?:[.):,\s]|$)")
_LETTER_NAMED = re.compile(r"\b(?i:answer|option)\s*(?:is|:)?\s*:?\s*\(?([A-Z])\b(?!')")


def parse_option(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter of the option that ``text`` names, or ``None``.

    Understood, in this order: the option's whole text; a letter in front (``B``, ``(B)``, ``B. sun``); a
    named letter (``the answer is B``). With ``options`` given, a letter beyond the last option is none; ``a``
    alone counts too.
    """
    text = text.strip()
    letters = string.ascii_uppercase[: len(options)] if options else string.ascii_uppercase
    whole = [letter for letter, option in zip(letters, options) if _bare(option) == _bare(text)]
    if len(whole) == 1 and text:
        return whole[0]
    text = text.upper() if len(text.strip("(). ")) == 1 else text
    match = _LETTER_FIRST.match(text) or _LETTER_NAMED.search(text)
    return match[1] if match and match[1] in letters else None


def similarity(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """Share of characters in place: 1 - edit distance / longer length, white space collapsed, case kept."""
    with needs("eval"):
        from rapidfuzz.distance import Levenshtein

    given = " ".join(prediction.split())
    return max((Levenshtein.normalized_similarity(given, " ".join(a.split())) for a in answers), default=0.0)


def item_f1(prediction: str, answers: Sequence[str], options: Sequence[str] = ()) -> float:
    """F1 over the comma-separated items of a list, in any order; an item given twice must occur twice."""
    given = _items(prediction)
    return max((_f1(given, _items(answer)) for answer in answers), default=0.0)


def _items(text: str) -> Counter[str]:
    return Counter(item for part in text.split(",") if (item := _bare(part)))


def _f1(given: Counter[str], wanted: Counter[str]) -> float:
    total = given.total() + wanted.total()
    return 2 * (given & wanted).total() / total if total else 1.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


METRICS: dict[str, Metric] = {
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
    "exact_match": exact_match,
    "option_letter": option_letter,
    "similarity": similarity,
    "item_f1": item_f1,
    "ai2d_letter": letters.ai2d,
    "scienceqa_letter": letters.scienceqa,
    "mmstar_letter": letters.mmstar,
    "mmbench_letter": letters.mmbench,
    "mmmu_answer": letters.mmmu,
}
