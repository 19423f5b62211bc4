"""Choosing by what the question attends to: the attention, rows of a batch, and what it costs."""

from dataclasses import replace

import pytest
import torch
from tiny import ask, tiny_vlm

from tokensel.cost.answers import answer_work, work_cost
from tokensel.cost.count import count_layers, count_projector
from tokensel.profiling.config import CostConfig
from tokensel.profiling.inference import counted
from tokensel.profiling.timing import time_answer
from tokensel.profiling.workload import MeasuredModel, Variant
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode, reduce
from tokensel.vlm.asked import asked, question_attention


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


ROWS = [0, [1, 2], None, 3]  # one image, two images, none, one


def test_the_attention_is_that_of_the_stock_model(vlm):
    encoded = encode(vlm.model, ask(vlm, ROWS))
    full = reduce(encoded)
    paid = question_attention(encoded, full)
    vlm.model.set_attn_implementation("eager")
    try:
        stock = torch.stack(vlm.model(**full, output_attentions=True).attentions).mean((0, 2))
    finally:
        vlm.model.set_attn_implementation("sdpa")
    expected = []
    for row, visual, real in zip(stock, full.visual, full["attention_mask"].bool()):
        last = int(visual.nonzero()[-1]) if visual.any() else -1
        question = real & (torch.arange(len(real)) > last)
        expected.append(row[question].mean(0)[visual])
    torch.testing.assert_close(paid, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_a_row_of_a_batch_is_read_as_it_is_alone(vlm):
    questions = ["what?", "what is that, and where does it stand?", "who?", "where is it?"]
    together = encode(vlm.model, ask(vlm, ROWS, questions))
    alone = [encode(vlm.model, ask(vlm, [row], [question])) for row, question in zip(ROWS, questions)]
    paid = question_attention(together, reduce(together))
    one_by_one = torch.cat([question_attention(row, reduce(row)) for row in alone])
    torch.testing.assert_close(paid, one_by_one, atol=1e-6, rtol=1e-4)
    reduced = asked(together, 0.3, thumbnail="last", neighbours=1)
    assert reduced.n_visual.tolist() == reduce(together, make_scorer("norm"), 0.3).n_visual.tolist()


def test_keeping_all_changes_no_input(vlm):
    encoded = encode(vlm.model, ask(vlm, ROWS))
    whole, chosen = reduce(encoded), asked(encoded, 1.0)
    assert whole.keys() == chosen.keys()
    for name in whole:
        assert torch.equal(whole[name], chosen[name]), name


def test_the_first_reading_is_counted(vlm):
    encoded = encode(vlm.model, ask(vlm, [0]))
    reduced = asked(encoded, 0.5)
    output = vlm.generate_output(reduced, 3)
    (work,) = answer_work(vlm.model, reduced, output)
    config, text = vlm.model.config, vlm.model.config.text_config
    without = {name: value for name, value in work.items() if name != "before"}
    more = work_cost(config, work, 4)[0] - work_cost(config, without, 4)[0]
    read = int(encoded.attention_mask.sum())
    dropped = int(encoded.n_visual[0] - reduced.n_visual[0])
    projected = count_projector(config, dropped + work["visual"]) - count_projector(config, work["visual"])
    assert more == count_layers(text, text.num_hidden_layers, read) + projected


def test_it_has_no_budget_of_its_own(vlm):
    encoded = encode(vlm.model, ask(vlm, [0]))
    with pytest.raises(TokenselError, match="give keep, such as"):
        asked(encoded, None)


def test_its_first_reading_is_timed_with_the_choice_and_counted(vlm):
    config = CostConfig("tiny", methods=("asked",), keeps=(0.5,), new_tokens=3, device="cpu")
    measured = MeasuredModel.of(config, vlm.model)
    inputs = dict(ask(vlm, [0]))
    encoded = encode(vlm.model, inputs)
    times = time_answer(measured, Variant("asked", 0.5), inputs)
    assert times["phases"]["selection"] > 0 and min(times["phases"].values()) >= 0
    text = int(encoded.attention_mask.sum()) - len(encoded.layout.cell)
    config = replace(config, text=text)
    whole = counted(config, measured, Variant("full", 1.0), encoded, encoded.input_ids.shape[1])
    chosen = counted(config, measured, Variant("asked", 0.5), encoded, times["length"], times["n_visual"])
    assert chosen.prefill > whole.prefill and chosen.projector == whole.projector
