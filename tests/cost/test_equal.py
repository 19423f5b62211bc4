"""What an answer would take under another schedule is what it takes; the fraction of equal cost is found."""

import pytest
from reference import prompt, vlm_of

from tokensel.cost.answers import answer_work, work_bytes, work_cost
from tokensel.cost.equal import keep_at_cost, work_under
from tokensel.schedules import Exponential, FastV, Fixed, Vtw
from tokensel.utils.errors import TokenselError

STEPS = 9


@pytest.fixture(scope="module")
def vlm():
    return vlm_of("llama")


def work_of(vlm, schedule, rows=(0, 1)):
    reduced = prompt(vlm, list(rows))
    return answer_work(vlm.model, reduced, vlm.generate_output(reduced, STEPS, schedule))


@pytest.mark.parametrize(
    "schedule", [FastV(2, 0.4), FastV(1, 1.0), Fixed(2, 0.3), Exponential(1, 0.7)], ids=repr
)
@pytest.mark.parametrize("given", [None, Exponential(2, 0.9)], ids=["full", "exponential"])
def test_the_work_under_a_schedule_is_that_of_a_run(vlm, schedule, given):
    known, wanted = work_of(vlm, given), work_of(vlm, schedule)
    for answer, own in zip(known, wanted, strict=True):
        foreseen = work_under(answer, schedule)
        assert foreseen["held"] == own["held"]
        # ranking where nothing is dropped costs a row of attention that is not foreseen
        assert foreseen["ranked"] == own["ranked"][: len(foreseen["ranked"])]


@pytest.mark.parametrize("cost", ["flops", "kv_bytes"])
@pytest.mark.parametrize("make", [lambda keep: FastV(2, keep), lambda keep: Exponential(1, keep)])
def test_the_fraction_of_a_run_is_found_again(vlm, cost, make):
    config, answers = vlm.model.config, work_of(vlm, make(0.62))
    keep = keep_at_cost(config, [answers], make, cost)
    count = work_cost if cost == "flops" else work_bytes

    def total(schedule):
        counted = [count(config, work_under(answer, schedule), 1) for answer in answers]
        return sum(one[0] if cost == "flops" else one for one in counted)

    assert total(make(keep)) == pytest.approx(total(make(0.62)), rel=0.01)
    assert keep == pytest.approx(0.62, abs=0.05)


def test_where_no_fraction_is_cheap_enough_the_least_is_given(vlm):
    config, cheap = vlm.model.config, work_of(vlm, FastV(1, 0.1))
    assert keep_at_cost(config, [cheap], lambda keep: Fixed(2, keep), "flops", 0.2) == 0.2
    assert keep_at_cost(config, [work_of(vlm, None)], lambda keep: FastV(2, keep), "kv_bytes") >= 0.99


def test_newlines_that_go_are_not_foreseen(vlm):
    (work,) = work_of(vlm, None, rows=[0])
    for schedule in (FastV(2, 0.5, "row"), Vtw(3)):
        with pytest.raises(TokenselError, match=f"newline is '{schedule.newline}'"):
            work_under(work, schedule)
