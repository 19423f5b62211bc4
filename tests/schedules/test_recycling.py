"""Recycling: which dropped tokens come back, how many, and as what."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import generated, prompt, vlm_of

from tokensel.schedules import SparseVLM
from tokensel.schedules.recycling import density_clusters, recycled
from tokensel.utils.errors import TokenselError


def states(seed: int, count: int, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), share=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_one_token_comes_back_for_ten_and_mass_is_kept(seed, count, share):
    x, scores = states(seed, count), states(seed + 1, count)[:, 0]
    back, become = recycled(x, scores, share)
    number = int(share * count)
    assert len(back) == len(become) == len(back.unique()) == (number // 10 + 1 if number else 0)
    best = set(scores.argsort(descending=True)[:number].tolist())
    assert set(back.tolist()) <= best
    if number:
        members = x[sorted(best)]
        centres, cluster = density_clusters(members, len(back))
        sizes = torch.bincount(cluster, minlength=len(centres))
        assert int(sizes.min()) >= 1 and int(sizes.sum()) == number
        # every clustered token counts once
        assert torch.allclose((become * sizes[:, None]).sum(0), members.sum(0), atol=1e-4)
        assert torch.equal(cluster[centres], torch.arange(len(centres)))


def test_clusters_are_found_where_they_are():
    spots = torch.eye(8)[:3] * 50
    x = (spots[:, None] + 0.1 * states(0, 30).view(3, 10, 8)).flatten(0, 1)
    centres, cluster = density_clusters(x, 3)
    assert sorted((centres // 10).tolist()) == [0, 1, 2]
    assert all(len(cluster[i * 10 : i * 10 + 10].unique()) == 1 for i in range(3))


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=20)
def test_clusters_move_with_an_order_and_do_not_change_with_a_shift(seed):
    x = states(seed, 24)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    (centres, cluster), (moved, again) = density_clusters(x, 3), density_clusters(x[order], 3)
    assert set(order[moved].tolist()) == set(centres.tolist())
    own = centres[cluster]
    assert torch.equal(order[moved[again]], own[order])
    assert torch.equal(density_clusters(x + 3, 3)[1], cluster)


def test_recycling_keeps_more_tokens_than_going_without_and_0_is_without():
    vlm = vlm_of("llama")
    reduced = prompt(vlm, [0])
    (plain, one), (none, two), (_, more) = (
        generated(vlm, reduced, SparseVLM(0.8, (1, 2, 3), recycling=share), 3)
        if share is not None
        else generated(vlm, reduced, SparseVLM(0.8, (1, 2, 3)), 3)
        for share in (None, 0.0, 0.5)
    )
    assert torch.equal(plain.sequences, none.sequences) and torch.equal(one.left[0], two.left[0])
    kept, dropped = int(one.cells[0][1, 0]), int(one.cells[0][0, 0] - one.cells[0][1, 0])
    assert int(more.cells[0][1, 0]) == kept + int(0.5 * dropped) // 10 + 1


@pytest.mark.parametrize("share", [-0.1, 1.1, "0.3", True])
def test_a_share_that_is_none_is_one_line(share):
    with pytest.raises(TokenselError, match=r"recycling is .*: give a number in \[0, 1\]"):
        SparseVLM(recycling=share)
