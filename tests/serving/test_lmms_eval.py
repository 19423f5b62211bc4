"""What lmms-eval's own client got from a running server, recorded once, is what the adapter answers."""

import json
from pathlib import Path

import pytest

from tokensel.benchmarks.metrics import anls
from tokensel.book.mini.suite import load
from tokensel.scorers import make_scorer
from tokensel.vlm import load_vlm, reduce_inputs

RECORD = Path(__file__).parents[1] / "benchmarks" / "lmms_eval" / "served_forms.json"


def test_answers_and_lengths_of_prompts_are_those_of_reduce_inputs(request):
    data = request.config.rootpath / "data" / "mini"
    rows = json.loads(RECORD.read_text())["rows"]
    questions = load("forms", "test", len(rows))
    vlm = load_vlm(data / "llava-next", device="cpu")
    scorer = make_scorer("selector", selector=str(data / "selector"))
    for start in range(0, len(rows), 25):
        part = questions[start : start + 25]
        inputs = vlm.inputs(part["image"], [vlm.prompt(text) for text in part["question"]])
        reduced = reduce_inputs(vlm.model, inputs, scorer, 0.5, positions="compact")
        answers = vlm.generate(reduced, max_new_tokens=8)
        lengths = reduced["attention_mask"].sum(1).tolist()
        same = zip(rows[start : start + 25], answers, lengths, part["answers"], strict=True)
        for (_, answer, length, score), own, held, right in same:
            assert (answer.strip(), length) == (own.strip(), held)
            assert score == pytest.approx(anls(own, right))
