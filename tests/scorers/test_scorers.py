"""The scorers and their common signature."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokensel.budget import top_fraction
from tokensel.data.features import Features
from tokensel.model.diffprune import DiffPrune, DiffPruneConfig
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.model.visionselector import VisionSelector, VisionSelectorConfig
from tokensel.scorers import SCORERS, Scorer, make_scorer
from tokensel.scorers.diversity import max_min_order
from tokensel.scorers.random import RandomScorer
from tokensel.scorers.uniform import even_order
from tokensel.utils.errors import TokenselError
from tokensel.utils.hashing import mix


def features(tiles: int = 3, tokens: int = 16, channels: int = 64, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(
        torch.randn(tiles, tokens, channels, generator=generator),
        cls_attention=torch.rand(tiles, tokens, generator=generator),
        keys=torch.arange(tiles) + 1000,
        tile=torch.arange(tokens).expand(tiles, -1) // 4,
        centre=torch.rand(tiles, tokens, 2, generator=generator),
        relevance=torch.rand(tiles, tokens, generator=generator),
    )


def selector(width: int = 64) -> TokenSelector:
    torch.manual_seed(0)
    return TokenSelector(SelectorConfig(width=width))


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_honours_the_protocol(name: str):
    learned = {"diffprune": DiffPrune(DiffPruneConfig(width=64))}
    learned["visionselector"] = VisionSelector(VisionSelectorConfig(width=64))
    scorer = make_scorer(name, seed=1, selector=selector(), **learned)
    assert isinstance(scorer, Scorer)
    assert scorer.name == name and scorer.scope in ("tile", "image")
    batch = features()
    scores = scorer(batch)
    assert scores.shape == (3, 16) and scores.dtype == torch.float32 and bool(scores.isfinite().all())
    # a tile is scored the same whatever batch it comes in
    torch.testing.assert_close(scorer(batch[1:2]), scores[1:2])


def test_unknown_names_are_refused():
    with pytest.raises(TokenselError, match="'fastv' is unknown: choose one of selector, random"):
        make_scorer("fastv")
    with pytest.raises(TokenselError, match="needs one: pass selector="):
        make_scorer("selector")


# random


def test_random_depends_on_seed_key_and_token_only():
    batch = features(tiles=5)
    scores = RandomScorer(3)(batch)
    shuffled = torch.tensor([4, 0, 2])
    assert torch.equal(RandomScorer(3)(batch[shuffled]), scores[shuffled])
    assert not torch.equal(RandomScorer(4)(batch), scores)
    # more tokens in the tile: the first ones keep their numbers
    longer = Features(torch.zeros(5, 40, 2), keys=batch.keys)
    assert torch.equal(RandomScorer(3)(longer)[:, :16], scores)


def test_random_is_uniform_and_independent():
    scores = RandomScorer(0)(Features(torch.zeros(200, 576, 1), keys=torch.arange(200)))
    assert abs(scores.mean().item() - 0.5) < 0.005 and abs(scores.var().item() * 12 - 1) < 0.01
    assert scores.min() >= 0 and scores.max() < 1
    apart = torch.corrcoef(scores) - torch.eye(200)
    assert apart.abs().max() < 0.25  # 576 numbers: five standard deviations are 0.21
    other = RandomScorer(1)(Features(torch.zeros(200, 576, 1), keys=torch.arange(200)))
    assert abs(torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1]) < 0.02
    shifted = torch.corrcoef(torch.stack([scores[:-1].flatten(), other[1:].flatten()]))[0, 1]
    assert abs(shifted) < 0.02  # seed + 1 is not key + 1


def test_mix_matches_splitmix64():
    # reference values of splitmix64 seeded with 1234567, as published with its source
    state, wanted = 1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = [int(mix(torch.tensor(state), i)) % (1 << 64) for i in range(3)]
    assert got == wanted


def test_random_without_keys_says_what_is_missing():
    with pytest.raises(TokenselError, match=r"needs Features\.keys"):
        RandomScorer(0)(Features(torch.zeros(1, 4, 2)))


# uniform


@given(side=st.integers(1, 14))
@settings(deadline=None, max_examples=14)
def test_even_order_visits_every_cell_once(side: int):
    assert sorted(even_order(side * side).tolist()) == list(range(side * side))


@pytest.mark.parametrize("side", [8, 16, 24])
def test_every_prefix_of_the_even_order_is_spread_evenly(side: int):
    order = even_order(side * side)
    for count in range(4, side * side, 7):
        taken = torch.zeros(side * side)
        taken[order[:count]] = 1
        grid = taken.view(side, side)
        quarters = grid.view(2, side // 2, 2, side // 2).sum((1, 3))
        # four quarters of the tile hold the same share, within two tokens or 15 % of the mean
        assert quarters.max() - quarters.min() <= max(2, 0.15 * count / 4)


def test_even_order_covers_the_tile_better_than_random_does():
    order, generator = even_order(576), torch.Generator().manual_seed(0)
    cells = torch.stack(torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij"), -1).view(-1, 2)
    for count in (20, 60, 150):
        reach = torch.cdist(cells, cells[order[:count]]).amin(1).max()
        luck = torch.cdist(cells, cells[torch.randperm(576, generator=generator)[:count]]).amin(1).max()
        assert reach < luck


def test_a_line_of_tokens_is_spread_too():
    assert even_order(12).tolist()[:3] == [0, 6, 3]
    assert sorted(even_order(7).tolist()) == list(range(7))


# diversity


def greedy_by_hand(tokens: torch.Tensor) -> list[int]:
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    alike = unit @ unit.T
    distance = 1 - (alike + alike.T) / 2  # the first two tokens may be nearest to each other: an exact tie
    count = len(tokens)
    nearest = [min(distance[i, j].item() for j in range(count) if j != i) for i in range(count)]
    order = [max(range(count), key=lambda i: nearest[i])]
    while len(order) < count:
        rest = [i for i in range(count) if i not in order]
        order.append(max(rest, key=lambda i: min(distance[i, j].item() for j in order)))
    return order


@given(seed=st.integers(0, 10**6), count=st.integers(2, 20))
@example(seed=493, count=7)
@settings(deadline=None, max_examples=25)
def test_max_min_order_is_the_greedy_one(seed: int, count: int):
    tokens = torch.randn(3, count, 8, generator=torch.Generator().manual_seed(seed))
    assert max_min_order(tokens).tolist() == [greedy_by_hand(row) for row in tokens]


def test_diversity_ignores_padding_and_prefers_the_unlike():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 10, 8, generator=generator)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    order = max_min_order(tokens, valid)
    assert order[1, :6].tolist() == max_min_order(tokens[1:, :6])[0].tolist()
    assert sorted(order[1, 6:].tolist()) == [6, 7, 8, 9]
    # nine copies of one token and one that differs: the odd one is among the first two
    copies = torch.ones(1, 10, 4)
    copies[0, 7] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert 7 in max_min_order(copies)[0, :2].tolist()


@pytest.mark.parametrize("count", [0, 1])
def test_diversity_of_none_or_one(count: int):
    assert max_min_order(torch.ones(2, count, 4)).shape == (2, count)
    alone = torch.zeros(1, 3, dtype=torch.bool)
    alone[0, 2] = True
    assert max_min_order(torch.ones(1, 3, 4), alone)[0, 0] == 2


# norm, CLS, selector


def test_norm_keeps_the_longest():
    batch = features()
    batch.tokens[:, 5] *= 100
    assert make_scorer("norm")(batch).argmax(1).tolist() == [5, 5, 5]


def test_cls_without_attention_says_what_is_missing():
    with pytest.raises(TokenselError, match="no CLS attention"):
        make_scorer("cls")(Features(torch.zeros(1, 4, 2)))


def test_selector_scores_are_its_logit_difference():
    model, batch = selector(), features()
    scorer = make_scorer("selector", selector=model)
    logits = model.logits(batch.tokens)
    torch.testing.assert_close(scorer(batch), (logits[..., 1] - logits[..., 0]).detach())
    assert torch.equal(scorer(batch) > 0, model.hard_mask(batch.tokens))
    assert torch.equal(top_fraction(scorer(batch), 0.25), model.keep_mask(batch.tokens, 0.25))
    assert scorer.adaptive and not scorer(batch).requires_grad


def test_selector_from_a_folder(tmp_path):
    selector().save_pretrained(tmp_path)
    batch = features()
    loaded = make_scorer("selector", selector=tmp_path)
    assert torch.equal(loaded(batch), make_scorer("selector", selector=selector())(batch))


def test_the_selector_works_in_the_precision_of_the_features_and_stays_what_it_was():
    model, batch = TokenSelector.from_pretrained("data/mini/selector"), features(tokens=64, channels=128)
    scorer = make_scorer("selector", selector=model)
    exact, half = scorer(batch), scorer(batch.to(dtype=torch.bfloat16))
    assert {weight.dtype for weight in scorer._fit(batch.tokens.bfloat16()).parameters()} == {torch.bfloat16}
    assert (
        half.dtype == torch.float32 and len(half.unique()) > 0.99 * half.numel()
    )  # rounded scores would tie
    same = top_fraction(exact, 0.3) == top_fraction(half, 0.3)
    assert same.float().mean() > 0.95
    assert model.dtype == torch.float32 and torch.equal(scorer(batch), exact)


def test_selector_of_another_width_is_refused_in_one_line():
    with pytest.raises(
        TokenselError, match="width 64, these have 32: give the selector that belongs"
    ) as caught:
        make_scorer("selector", selector=selector(64))(features(channels=32))
    assert "\n" not in str(caught.value)
