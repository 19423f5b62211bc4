"""The law of evidence: what its parts mean, that it is found again, and that it is held back."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensel.book.mini.law import WHOLE, Law, cases, fit_law, held_back

SHARES = st.floats(0.01, 0.99)
TOKENS = st.floats(1, 200)
KEEPS = (0.1, 0.3, 0.6)
NAMES = {"spots": (1, 0), "objects": (0.8, 0), "strings": (0, 1), "forms": (0.5, 0.5)}


def table(law: Law, names: dict[str, tuple[float, float]]) -> pd.DataFrame:
    """The scores of benchmarks that follow a law, between 0.1 without the image and 0.9 with all of it.

    ``names``: of each benchmark, which part of its evidence is cue, and which is read.
    """
    rows = []
    for name, (cue, letters) in names.items():
        for most in (4, 16, 64):
            facts = {"benchmark": name, "most": most, "cue": cue * most, "letters": letters * most, "n": 50}
            for method, keep, seen in (
                ("full", 1.0, 1.0),
                ("none", 0.0, 0.0),
                *(("random", k, None) for k in KEEPS),
            ):
                kept = {"kept_cue": keep, "kept_letters": keep}
                if seen is None:
                    seen = float(law.seen(cue * most, keep, letters * most, keep))
                rows.append(facts | kept | {"method": method, "keep": keep, "score": 0.1 + 0.8 * seen})
    whole = [row | {"most": 0} for row in rows if row["most"] == 4]  # of all questions: predicted by none
    return pd.DataFrame(rows + whole)


@given(tokens=TOKENS, kept=SHARES, more=st.floats(1.01, 5))
def test_a_larger_cue_helps_and_more_letters_hurt(tokens, kept, more):
    law = Law()
    cues = [float(law.seen(tokens * factor, kept, 0, 1)) for factor in (1, more)]
    letters = [float(law.seen(0, 1, tokens * factor, kept)) for factor in (1, more)]
    assert cues == sorted(cues) and letters == sorted(letters, reverse=True)
    assert all(0 <= seen <= 1 for seen in cues + letters)


@given(cue=TOKENS, letters=TOKENS, kept=SHARES)
def test_all_kept_is_all_seen_and_more_is_never_worse(cue, letters, kept):
    law = Law()
    for sizes in ((cue, 0), (0, letters), (cue, letters)):
        seen = [float(law.seen(sizes[0], share, sizes[1], share)) for share in (0.0, kept / 2, kept, 1.0)]
        assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == pytest.approx(1)


@given(cue=TOKENS, letters=TOKENS, kept=SHARES)
def test_text_with_a_cue_is_read_where_both_are_seen(cue, letters, kept):
    law = Law()
    alone = law.seen(cue, kept, 0, 1) * law.seen(0, 1, letters, kept)
    assert float(law.seen(cue, kept, letters, kept)) == pytest.approx(float(alone))


def test_the_constants_are_found_again_and_a_held_back_benchmark_is_predicted():
    law = Law(tells=0.5, needs=0.07)
    rows = cases(table(law, NAMES | dict.fromkeys(WHOLE, (1, 0))))
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
    rows = cases(table(law, NAMES))
    changed = rows.assign(score=rows["score"].mask(rows["benchmark"] == "forms", 0.0))
    before, after = (held_back(one).set_index(["benchmark", "keep"])["predicted"] for one in (rows, changed))
    assert np.allclose(before["forms"], after["forms"])
    assert not np.allclose(before["strings"], after["strings"])
