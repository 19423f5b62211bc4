"""Cells that bring their neighbours along: rows of every layout, the budget, and what stays as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ask, tiny_vlm

from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Choices, Vlm, encode, reduce
from tokensel.vlm.choose import choose_cells
from tokensel.vlm.layout import Layout, plain_layout


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    """Two joined maps with newlines and thumbnails, and tiles of several sizes one after the other."""
    vlm = tiny_vlm()
    joined = encode(vlm.model, ask(vlm, [0, [1, 2], None, 3])).layout
    return [joined, plain_layout(torch.tensor([[3, 4], [1, 5], [1, 2], [2, 2]]), [2, 2], True)]


def rows_of(layout: Layout) -> list[list[int]]:
    """Places of the cells of each row, found by comparing cells one by one."""
    middles = torch.full((len(layout.cell), 2), torch.nan)
    middles[layout.cell] = layout.centres
    rows: list[list[int]] = []
    for place in layout.cell.nonzero()[:, 0].tolist():
        before = rows[-1][-1] if rows else -1
        alike = rows and before == place - 1 and layout.image[before] == layout.image[place]
        if alike and layout.grid is not None:
            alike = layout.source[before] // layout.tokens == layout.source[place] // layout.tokens
        alike = alike and layout.thumbnail[before] == layout.thumbnail[place]
        if alike and middles[before, 0] == middles[place, 0]:
            rows[-1].append(place)
        else:
            rows.append([place])
    return rows


def test_a_row_is_known_in_every_layout(layouts):
    for layout in layouts:
        first = {row[0] for row in rows_of(layout)}
        wanted = [bool(cell) and place not in first for place, cell in enumerate(layout.cell)]
        assert layout.behind.tolist() == wanted
    assert [len(row) for row in rows_of(layouts[1])] == [4, 4, 4, 5, 2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(
    which=st.integers(0, 1),
    keep=st.sampled_from([0.05, 0.2, 0.5, 0.9, 1.0]),
    count=st.integers(0, 4),
    budget=st.sampled_from(["image", "tile"]),
    thumbnail=st.sampled_from(["compete", "keep", "last", "drop"]),
    seed=st.integers(0, 99),
)
def test_the_budget_stays_and_a_cell_is_worth_the_best_around_it(
    layouts, which, keep, count, budget, thumbnail, seed
):
    layout = layouts[which]
    scores = torch.randint(0, 8, (len(layout.cell),), generator=torch.Generator().manual_seed(seed)).float()
    around = scores.clone()
    for row in rows_of(layout):
        for at, place in enumerate(row):
            around[place] = max(scores[other] for other in row[max(at - count, 0) : at + count + 1])
    # of equals, those first that are the best themselves
    order = around * 100 + scores
    alone = choose_cells(layout, order, keep, Choices(budget, thumbnail))
    together = choose_cells(layout, scores, keep, Choices(budget, thumbnail, neighbours=count))
    assert torch.equal(together, alone)


def test_the_best_cell_brings_its_row_along(layouts):
    layout = layouts[1]
    scores = torch.zeros(len(layout.cell))
    scores[6] = 1.0  # row 1 of the first tile, column 2 of 4
    chosen = choose_cells(layout, scores, 3 / 17, Choices(neighbours=1))
    assert chosen[: layout.tiles[0] * 12].nonzero()[:, 0].tolist()[:3] == [5, 6, 7]


def test_everything_kept_changes_no_logit_and_nonsense_is_refused():
    vlm: Vlm = tiny_vlm()
    encoded = encode(vlm.model, ask(vlm, [0, 3]))
    norm = make_scorer("norm")
    whole, all_kept = reduce(encoded), reduce(encoded, norm, 1.0, neighbours=2)
    with torch.no_grad():
        assert torch.equal(vlm.model(**whole).logits, vlm.model(**all_kept).logits)
    for value in (-1, 1.5, True, "2"):
        with pytest.raises(TokenselError, match=r"neighbours is .*: give a whole number of at least 0"):
            reduce(encoded, norm, 0.3, neighbours=value)
    with pytest.raises(TokenselError, match="neighbours is 2 and budget 'threshold'"):
        reduce(encoded, norm, 0.3, neighbours=2, budget="threshold")
    broken = torch.full((len(encoded.layout.cell),), torch.nan)
    with pytest.raises(TokenselError, match="NaN"):
        choose_cells(encoded.layout, broken, 0.3, Choices(neighbours=1))
