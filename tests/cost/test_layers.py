"""The layer average of a schedule is what enters the layers, and the label that reaches it is found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import generated, prompt, vlm_of

from tokensel.cost import answer_costs, count_decoder
from tokensel.cost.answers import answer_work
from tokensel.cost.layers import keep_at_share, layer_shares, mean_share, mean_tokens, prefill_flops
from tokensel.schedules import SCHEDULES, Clse, FastV, PriorTR, SparseVLM, Vtw, cuts_at_depth, make_schedule
from tokensel.utils.errors import TokenselError

LATER = {"fixed", "exponential", "fastocr"}  # these read the whole prompt
PREFILL = sorted({name for name, row in SCHEDULES.items() if row.uses_keep} - LATER)


def options(name, depth):
    return cuts_at_depth(name, depth) or {"layer": 2}


@pytest.mark.parametrize("name", PREFILL)
def test_shares_are_the_counts_of_a_run(name):
    vlm = vlm_of("llama", layers=6)
    reduced = prompt(vlm, [0])
    schedule = make_schedule(name, keep=0.4, **options(name, 6))
    _, pruning = generated(vlm, reduced, schedule, 1)
    cells = pruning.cells[0][:, 0].numpy()
    assert np.allclose(cells / cells[0], layer_shares(schedule, 6), atol=1 / cells[0])
    (work,) = answer_work(vlm.model, reduced, vlm.generate_output(reduced, 1, schedule))
    newlines = int(reduced.n_newline)
    assert mean_tokens(work) == pytest.approx(cells.mean() + newlines)


@pytest.mark.parametrize("schedule", [FastV(2, 0.4), PriorTR(2, 0.4), Vtw(2)])
def test_flops_are_those_that_are_counted_from_a_run(schedule):
    vlm = vlm_of("llama", layers=6)
    reduced = prompt(vlm, [0])
    text, config = int((~reduced.visual).sum()), vlm.model.config.text_config
    cells, newlines = int(reduced.n_visual), int(reduced.n_newline)

    def language_model(schedule):
        (whole,) = answer_costs(vlm.model, reduced, vlm.generate_output(reduced, 1, schedule))
        (full,) = answer_costs(vlm.model, reduced, vlm.generate_output(reduced, 1))
        return whole[0] - full[0] + count_decoder(config, text + cells + newlines)

    measured = language_model(schedule)
    predicted = prefill_flops(config, schedule, text, cells, newlines)
    assert predicted == pytest.approx(measured, rel=0.02) and predicted <= measured
    assert predicted < prefill_flops(config, FastV(2, 1.0), text, cells, newlines)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PREFILL), st.integers(4, 40), st.floats(0.05, 0.999))
def test_the_label_reaches_the_average_or_cannot(name, depth, share):
    given_options = options(name, depth)
    least = mean_share(make_schedule(name, keep=0.0, **given_options), depth)
    most = mean_share(make_schedule(name, keep=1 - 1e-9, **given_options), depth)
    if not least <= share <= most:  # clse keeps a third of its label at the end, even of 0.99
        with pytest.raises(TokenselError, match="reads at least" if share < least else "reads at most"):
            keep_at_share(name, share, depth, **given_options)
    else:
        keep = keep_at_share(name, share, depth, **given_options)
        reached = mean_share(make_schedule(name, keep=keep, **given_options), depth)
        assert 0.0 <= keep <= 1.0 and reached == pytest.approx(share, abs=1e-6)


def test_published_labels():
    # CLSE's "192 of 576" tokens in 32 layers: the public code keeps 330, 210 and 62 from layers 1, 11, 21 on
    average = 576 * mean_share(Clse(192 / 576), 32)
    assert average == pytest.approx((576 + 10 * 330 + 10 * 210 + 11 * 62) / 32, rel=0.01)
    assert round(average) > 192
    assert mean_share(Vtw(16), 32) == 0.5
    assert mean_share(FastV(2, 0.5), 32) == pytest.approx((2 + 30 * 0.5) / 32)


def test_what_cannot_be_said_in_advance_is_refused():
    with pytest.raises(TokenselError, match="depends on the prompt"):
        layer_shares(SparseVLM(0.5, (1, 2)), 4)
    with pytest.raises(TokenselError, match="takes no keep"):
        keep_at_share("vtw", 0.5, 6)
    with pytest.raises(TokenselError, match="keep is 0"):
        keep_at_share("fastv", 0.0, 6)
    with pytest.raises(TokenselError, match="at least 1"):
        keep_at_share("fastocr", 0.5, 6)  # reads the whole prompt
    with pytest.raises(TokenselError, match="row"):
        prefill_flops(vlm_of("llama").model.config.text_config, FastV(2, 0.5, "row"), 5, 30, 4)
