"""The ten benchmarks of the paper (Figs. 4 to 7), with the prompts, limits and metrics of lmms-eval.

Numbers are comparable with those of lmms-eval 0.7.3. Differences from it, or between its versions, that
change a score:

- MMBench is scored by the circular rule without a judge model (lmms-eval's ``mmbench_en_dev_static``); an
  option that is missing in the data ("nan" there) is left out here.
- MMMU: an answer that names no option is wrong, where lmms-eval draws one at random; each of several right
  answers to an open question is accepted, where lmms-eval compares with the list as text. Up to 0.5.0 answers
  were cut at 16 tokens, now at 128.
- MMStar: up to 0.5.0 only the first character or "the answer is" counted.
- lmms-eval 0.7 downloads mirrors under ``lmms-lab-encoder``; the originals are read here.

Images come before the question, also where a question has several (MMMU); its text still refers to them as
``<image 1>``.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokensel.benchmarks.hub import HubData
from tokensel.benchmarks.table import Benchmark

Row = Mapping[str, Any]
UNLIMITED = 1024  # lmms-eval's limit where a task sets none
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

# Discipline of each of MMMU's subjects (arXiv 2311.16502).
DISCIPLINES = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
_DISCIPLINE = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()}


def lettered(options: Sequence[str]) -> str:
    """``A. sun``, ``B. moon``: one option a line."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(_letters(len(options)), options))


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]


# From a row of the Hub's data to one question.


def _docvqa(row: Row, _: int) -> dict[str, Any]:
    return _question(row, row["questionId"], row["question"], row["answers"])


def _chartqa(row: Row, number: int) -> dict[str, Any]:
    kind = "human" if row["type"] == "human_test" else "augmented"
    return _question(row, number, row["question"], [row["answer"]], category=kind)


def _textvqa(row: Row, _: int) -> dict[str, Any]:
    return _question(row, row["question_id"], row["question"].capitalize(), row["answers"])


def _mmbench(row: Row, _: int) -> dict[str, Any]:
    options = [row[letter] for letter in "ABCD" if row[letter] not in (None, "", "nan")]
    hint = f"{row['hint']} " if row["hint"] not in (None, "nan") else ""
    cluster = str(
        int(row["index"]) % 1_000_000
    )  # the rotations of a question differ by multiples of a million
    question = f"{hint}{row['question']}"
    return _question(
        row, row["index"], question, [row["answer"]], options, category=row["L2-category"], cluster=cluster
    )


def _ai2d(row: Row, number: int) -> dict[str, Any]:
    answer = _letters(len(row["options"]))[int(row["answer"])]
    return _question(row, number, row["question"], [answer], row["options"])


def _gqa(row: Row, _: int) -> dict[str, Any]:
    return _question(row, row["id"], row["question"], [row["answer"]])


def _mmmu(row: Row, _: int) -> dict[str, Any]:
    options = ast.literal_eval(row["options"]) if row["question_type"] == "multiple-choice" else []
    several = row["answer"].startswith("[") and not options
    answers = ast.literal_eval(row["answer"]) if several else [row["answer"]]
    named = sorted(set(re.findall(r"<image (\d)>", row["question"] + lettered(options))))
    discipline = _DISCIPLINE.get(re.sub(r"^[^_]+_|_\d+$", "", row["id"]), "")
    images = [row[f"image_{number}"] for number in named]
    return _question(row, row["id"], row["question"], answers, options, category=discipline, image=images)


def _mmstar(row: Row, _: int) -> dict[str, Any]:
    question = row["question"].strip().replace(" Please answer yes or no.", "")
    return _question(
        row, row["index"], question, [row["answer"]], category=row["category"], cluster=row["l2_category"]
    )


def _scienceqa(row: Row, number: int) -> dict[str, Any]:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    answer = _letters(len(row["choices"]))[row["answer"]]
    return _question(row, number, f"{context}{row['question']}", [answer], row["choices"])


def _question(
    row: Row, name: Any, question: str, answers: Sequence[str], options: Sequence[str] = (), **more: Any
) -> dict:
    columns = {"image": row.get("image"), "question": question, "question_id": str(name)}
    return columns | {"answers": list(answers), "options": list(options)} | more


# From a question to the model's prompt.


def _phrase(row: Row) -> str:
    return row["question"] + SHORT


def _word(row: Row) -> str:
    return f"{row['question']}\nAnswer the question with a single word."


def _choice(row: Row) -> str:
    return f"{row['question']}\n{lettered(row['options'])}{LETTER}"


def _there_are(row: Row) -> str:
    return f"{row['question']} There are several options:\n{lettered(row['options'])}\n{LETTER}"


def _given(row: Row) -> str:
    # the question contains the options, and ends without a full stop
    return row["question"] + LETTER.removesuffix(".")


def _choice_or_phrase(row: Row) -> str:
    return (
        f"{row['question']}\n{lettered(row['options'])}\n{LETTER}"
        if row["options"]
        else f"{row['question']}\n{SHORT}"
    )


MMMU_COLUMNS = (
    "id",
    "question",
    "options",
    "answer",
    "question_type",
    *(f"image_{number}" for number in range(1, 8)),
)
DOCUMENT = ("questionId", "question", "answers", "image")

BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark(
            "docvqa",
            "reading",
            "anls",
            32,
            HubData("lmms-lab/DocVQA", "DocVQA", "validation", DOCUMENT, _docvqa),
            _phrase,
        ),
        Benchmark(
            "chartqa",
            "reading",
            "relaxed_accuracy",
            16,
            HubData("lmms-lab/ChartQA", None, "test", ("type", "question", "answer", "image"), _chartqa),
            _word,
        ),
        Benchmark(
            "infovqa",
            "reading",
            "anls",
            32,
            HubData("lmms-lab/DocVQA", "InfographicVQA", "validation", DOCUMENT, _docvqa),
            _phrase,
        ),
        Benchmark(
            "textvqa",
            "reading",
            "vqa_accuracy",
            UNLIMITED,
            HubData(
                "lmms-lab/textvqa",
                None,
                "validation",
                ("question_id", "question", "answers", "image"),
                _textvqa,
            ),
            _phrase,
        ),
        Benchmark(
            "mmbench",
            "reading",
            "mmbench_letter",
            UNLIMITED,
            HubData(
                "lmms-lab/MMBench",
                "en",
                "dev",
                ("index", "question", "hint", "answer", "A", "B", "C", "D", "image", "L2-category"),
                _mmbench,
                circular=True,
            ),
            _there_are,
            aggregate="all",
        ),
        Benchmark(
            "ai2d",
            "general",
            "ai2d_letter",
            16,
            HubData("lmms-lab/ai2d", None, "test", ("question", "options", "answer", "image"), _ai2d),
            _choice,
        ),
        Benchmark(
            "gqa",
            "general",
            "exact_match",
            16,
            HubData(
                "lmms-lab/GQA",
                "testdev_balanced_instructions",
                "testdev",
                ("id", "imageId", "question", "answer"),
                _gqa,
                images="testdev_balanced_images",
            ),
            _phrase,
        ),
        Benchmark(
            "mmmu",
            "general",
            "mmmu_answer",
            128,
            HubData("lmms-lab/MMMU", None, "validation", MMMU_COLUMNS, _mmmu, several=True),
            _choice_or_phrase,
        ),
        Benchmark(
            "mmstar",
            "general",
            "mmstar_letter",
            UNLIMITED,
            HubData(
                "Lin-Chen/MMStar",
                None,
                "val",
                ("index", "question", "image", "answer", "category", "l2_category"),
                _mmstar,
            ),
            _given,
            aggregate="macro",
        ),
        Benchmark(
            "scienceqa",
            "general",
            "scienceqa_letter",
            16,
            HubData(
                "lmms-lab/ScienceQA",
                "ScienceQA-IMG",
                "test",
                ("image", "question", "choices", "answer", "hint"),
                _scienceqa,
            ),
            _choice,
        ),
    )
}
