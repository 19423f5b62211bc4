"""What lmms-eval needs of the task "forms". Run as a script, it writes the questions to ``_build/forms``."""

import datasets

from tokensel.benchmarks.metrics import anls
from tokensel.book.mini.suite import load


def images(row):
    return [row["image"].convert("RGB")]


def question(row, lmms_eval_specific_kwargs=None):
    return row["question"]


def right_answer(row):
    return row["answers"][0]


def score(row, answers):
    return {"anls": anls(answers[0], row["answers"])}


if __name__ == "__main__":
    datasets.DatasetDict(test=load("forms", "test", 100)).save_to_disk("_build/forms")
