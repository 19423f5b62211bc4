"""The law of evidence: what its parts mean, that it is found again, and that it is held back."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensel.book.mini.law import WHOLE, Law, cases, fit_law, held_back

SHARES = st.floats(0.01, 0.99)
TOKENS = st.floats(1, 200)


def table(law: Law, names: dict[str, bool]) -> pd.DataFrame:
    """The scores of benchmarks that follow a law, between 0.1 without the image and 0.9 with all of it."""
    rows = []
    for number, (name, complete) in enumerate(names.items()):
        for most in (4, 16, 64):
            facts = {"benchmark": name, "most": most, "tokens": most - number, "complete": complete, "n": 50}
            rows.append(facts | {"method": "full", "keep": 1.0, "kept": 1.0, "score": 0.9})
            rows.append(facts | {"method": "none", "keep": 0.0, "kept": 0.0, "score": 0.1})
            for keep in (0.1, 0.3, 0.6):
                score = 0.1 + 0.8 * float(law.seen(most - number, keep, complete))
                rows.append(facts | {"method": "random", "keep": keep, "kept": keep, "score": score})
    whole = [row | {"most": 0} for row in rows if row["most"] == 4]  # of all questions: predicted by none
    return pd.DataFrame(rows + whole)


@given(tokens=TOKENS, kept=SHARES, more=st.floats(1.01, 5))
def test_larger_evidence_helps_where_any_part_tells_and_hurts_where_all_is_needed(tokens, kept, more):
    law = Law()
    small, large = (law.seen([tokens * factor] * 2, [kept] * 2, [False, True]) for factor in (1, more))
    assert large[0] >= small[0] and large[1] <= small[1]
    assert ((small >= 0) & (small <= 1)).all()


@given(tokens=TOKENS, kept=SHARES, complete=st.booleans())
def test_all_kept_is_all_seen_and_more_is_never_worse(tokens, kept, complete):
    law = Law()
    seen = [float(law.seen(tokens, share, complete)) for share in (0.0, kept / 2, kept, 1.0)]
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == pytest.approx(1)


def test_the_constants_are_found_again_and_a_held_back_benchmark_is_predicted():
    law = Law(tells=0.5, needs=0.07)
    names = {"spots": False, "objects": False, "strings": True, "forms": True}
    rows = cases(table(law, names | dict.fromkeys(WHOLE, False)))
    assert len(rows) == 4 * 3 * 3 and set(rows["method"]) == {"random"}
    found = fit_law(rows)
    for name in ("tells", "needs"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.05)
    predicted = held_back(rows)
    assert len(predicted) == 4 * 3
    assert (predicted["predicted"] - predicted["score"]).abs().max() < 0.01
    assert np.allclose(predicted["n"], 150)


def test_a_benchmark_is_predicted_without_its_own_scores():
    law = Law()
    rows = cases(table(law, {"spots": False, "objects": False, "strings": True, "forms": True}))
    changed = rows.assign(score=rows["score"].mask(rows["benchmark"] == "forms", 0.0))
    before, after = (held_back(one).set_index(["benchmark", "keep"])["predicted"] for one in (rows, changed))
    assert np.allclose(before["forms"], after["forms"])
    assert not np.allclose(before["strings"], after["strings"])
