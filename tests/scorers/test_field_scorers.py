"""Scorers of the field: the laws of each, and merging."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WIDTH, ask, noise_image, tiny_vlm

from tokensel.budget import top_fraction
from tokensel.data.features import Features
from tokensel.methods import Batch, check_method, prepare
from tokensel.scorers import SCORERS, make_scorer
from tokensel.scorers.apet import residual
from tokensel.scorers.cdpruner import greedy_order
from tokensel.scorers.lowest import LOWEST, Lowest
from tokensel.scorers.merging import merge_nearest
from tokensel.scorers.ranks import falling_ranks, ranks_in_groups
from tokensel.scorers.scope import coverage_order
from tokensel.utils.errors import TokenselError
from tokensel.vlm import encode, pool, reduce

FIELD = ("dart", "hired", "apet", "visionzip", "cdpruner", "scope")


def tokens(seed: int, rows: int = 2, count: int = 12, channels: int = 16) -> torch.Tensor:
    return torch.randn(rows, count, channels, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.mark.parametrize("name", FIELD)
def test_every_budget_is_met_alike_in_every_batch_and_keep_1_changes_nothing(vlm, name):
    both = encode(vlm.model, ask(vlm, [0, [1, 3]]))
    whole = reduce(both)
    for keep in (0.1, 0.4):
        reduced = reduce(both, make_scorer(name), keep)
        alone = reduce(encode(vlm.model, ask(vlm, [0])), make_scorer(name), keep)
        assert torch.equal(reduced.kept[: len(alone.kept)], alone.kept)
        n = int(alone.n_visual_full)
        assert int(alone.n_visual) == max(1, round(keep * n))
    every = reduce(both, make_scorer(name), 1.0)
    assert torch.equal(every["inputs_embeds"], whole["inputs_embeds"])


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
@settings(deadline=None, max_examples=15)
def test_padding_changes_no_rank(seed, count):
    padded = tokens(seed)
    valid = torch.arange(12).expand(2, -1) < count
    generator = torch.Generator().manual_seed(seed)
    more = {
        "tile": (torch.arange(12) // 5).expand(2, -1),
        "centre": torch.rand(2, 12, 2, generator=generator),
        "relevance": torch.rand(2, 12, generator=generator),
        "cls_attention": torch.rand(2, 12, generator=generator),
    }
    short = {name: value[:, :count] for name, value in more.items()}
    for name in ("dart", "apet", "cdpruner", "hired", "scope"):
        scorer = make_scorer(name)
        long = scorer(Features(padded, valid=valid, **more))[:, :count]
        alone = scorer(Features(padded[:, :count], **short))
        assert torch.equal(falling_ranks(long), falling_ranks(alone)), name


def test_ranks_in_groups_by_hand():
    values, group = torch.tensor([[5.0, 7.0, 7.0, 1.0, 9.0]]), torch.tensor([[1, 0, 0, 1, 1]])
    assert ranks_in_groups(values, group).tolist() == [[1, 0, 1, 2, 0]]


# SCOPE


@given(seed=st.integers(0, 10**6), power=st.sampled_from([0.0, 1.0, 2.0]))
@settings(deadline=None, max_examples=15)
def test_scope_takes_what_adds_most_to_the_coverage_times_its_saliency(seed, power):
    features, saliency = tokens(seed), torch.rand(2, 12, generator=torch.Generator().manual_seed(seed))
    scores = make_scorer("scope", saliency=power)(Features(features, cls_attention=saliency))
    for row in range(2):
        unit = [token / token.norm() for token in features[row].double()]
        order = scores[row].argsort(descending=True).tolist()

        def coverage(chosen, unit=unit):
            return sum(max([0.0, *(float(unit[i] @ unit[j]) for j in chosen)]) for i in range(12))

        for step in range(12):
            taken = order[:step]
            worth = {
                j: (coverage([*taken, j]) - coverage(taken)) * float(saliency[row, j]) ** power
                for j in order[step:]
            }
            # two tokens that cover each other alone add equally much
            assert worth[order[step]] == pytest.approx(max(worth.values()), abs=1e-5)


def test_scope_knows_no_units_and_follows_a_permutation():
    features, saliency = tokens(5), torch.rand(2, 12, generator=torch.Generator().manual_seed(5))
    scores = make_scorer("scope")(Features(features, cls_attention=saliency))
    assert torch.equal(make_scorer("scope")(Features(8 * features, cls_attention=saliency / 4)), scores)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(6))
    other = make_scorer("scope")(Features(features[:, order], cls_attention=saliency[:, order]))
    assert torch.equal(other, scores[:, order])


def test_scope_takes_a_copy_after_all_that_is_new_and_then_the_more_salient_copy():
    base = torch.eye(6)[None].repeat(1, 2, 1)  # every token twice
    saliency = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06]])
    order = coverage_order(base, saliency)[0].tolist()
    assert order == [5, 4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6]
    none = coverage_order(base, torch.zeros(1, 12))[0].tolist()
    assert none == list(range(12)), "without saliency nobody is worth more than another"


def test_scope_without_attention_or_with_a_power_that_is_none_is_one_line():
    with pytest.raises(TokenselError, match="'scope' has no CLS attention"):
        make_scorer("scope")(Features(tokens(0)))
    for power in (-1.0, float("nan"), 100.0):
        with pytest.raises(TokenselError, match="saliency is"):
            make_scorer("scope", saliency=power)


# DART


def test_dart_drops_copies_of_its_pivots_first():
    base = tokens(0, 1, 20)
    base[0, :2] *= 10  # two pivots
    base[0, 5], base[0, 9] = base[0, 0] / 20, base[0, 1] / 20
    scores = make_scorer("dart", pivots=2)(Features(base))
    assert set(scores[0].topk(2).indices.tolist()) == {0, 1}
    # each is alike to one pivot, so the other one names it somewhere: with one pivot it comes last
    one = make_scorer("dart", pivots=1)(Features(base[:, [0, 5, *range(10, 20)]]))
    assert int(one[0].argmin()) == 1


def test_dart_takes_turns_among_its_pivots():
    """Two orthogonal pivots, and two groups that are each unlike one of them: both groups come early."""
    plane = torch.zeros(1, 6, 3)
    plane[0, 0, 0], plane[0, 1, 1] = 9.0, 8.0
    plane[0, 2], plane[0, 3] = torch.tensor([-1.0, 0.9, 0]), torch.tensor([0.9, -1.0, 0])
    plane[0, 4], plane[0, 5] = torch.tensor([0.5, 0.6, 0]), torch.tensor([0.6, 0.5, 0])
    scores = make_scorer("dart", pivots=2)(Features(plane))
    assert set(scores[0].topk(4).indices.tolist()) == {0, 1, 2, 3}


# HiRED


def test_hired_gives_tiles_tokens_in_proportion_to_the_thumbnail():
    """A thumbnail of 2x2 over two tiles side by side; nine tenths of its attention fall on the left one."""
    tile = torch.tensor([[0] * 4 + [1] * 10 + [2] * 10])
    centre = torch.full((1, 24, 2), 0.25)
    centre[0, :4] = torch.tensor([[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]])
    centre[0, 14:, 1] = 0.75
    attention = torch.rand(1, 24, generator=torch.Generator().manual_seed(0)) / 100
    attention[0, 0], attention[0, 1] = 0.9, 0.1
    scorer = make_scorer("hired", thumbnail_share=0.1)
    scores = scorer(Features(torch.zeros(1, 24, 1), cls_attention=attention, tile=tile, centre=centre))
    kept = top_fraction(scores, 10 / 24)[0]
    # shares .1, .81 and .09 of ten tokens
    assert [int(kept[tile[0] == number].sum()) for number in range(3)] == [1, 8, 1]
    for number in range(3):
        here = tile[0] == number
        assert attention[0, here & kept].min() > attention[0, here & ~kept].max()


def test_hired_reads_where_a_token_is_and_the_centres_are_those_of_the_image(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, 2, [1, 3]]))
    centres, layout = encoded.layout.centres, encoded.layout
    assert bool((centres > 0).all() and (centres < 1).all())
    for image in range(len(layout.tiles)):
        for small in (True, False):
            cells = (layout.image == image)[layout.cell] & (layout.thumbnail[layout.cell] == small)
            if not bool(cells.any()):
                continue
            grid = centres[cells]
            high, wide = len(grid[:, 0].unique()), len(grid[:, 1].unique())
            assert high * wide == len(grid) == len(grid.unique(dim=0))
            torch.testing.assert_close(grid.mean(0), torch.tensor([0.5, 0.5]))
    with pytest.raises(TokenselError, match=r"needs Features\.tile"):
        make_scorer("hired")(Features(tokens(0), cls_attention=torch.ones(2, 12)))


# ApET


@given(seed=st.integers(0, 10**6), basis=st.integers(1, 6))
@settings(deadline=None, max_examples=20)
def test_apet_is_the_least_squares_error_over_its_basis(seed, basis):
    given_tokens = tokens(seed)
    error = residual(given_tokens, basis)
    for row, of_row in zip(given_tokens.double(), error):
        nearest = row.norm(dim=1)
        chosen = []
        for _ in range(basis):
            chosen.append(int(nearest.argmax()))
            away = (row - row[chosen[-1]]).norm(dim=1)
            nearest = away if len(chosen) == 1 else torch.minimum(nearest, away)
        weights = torch.linalg.lstsq(row[chosen].T, row.T).solution
        torch.testing.assert_close(
            of_row.double(), (row - weights.T @ row[chosen]).norm(dim=1), rtol=1e-3, atol=1e-4
        )


def test_apet_s_error_vanishes_in_the_span_of_its_basis():
    line = tokens(1, 1, 3, 16)
    mixed = torch.rand(1, 20, 3, generator=torch.Generator().manual_seed(2)) @ line
    assert residual(mixed, 10).max() < 1e-4
    assert residual(tokens(3), 30).max() < 1e-4  # as many as there are


# merging


@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
@settings(deadline=None, max_examples=20)
def test_merging_keeps_the_mass_and_the_count(seed, share):
    features = tokens(seed)
    kept = torch.rand(2, 12, generator=torch.Generator().manual_seed(seed)) < share
    merged = merge_nearest(features, kept, ~kept)
    assert merged.shape == features.shape and torch.equal(merged[~kept], features[~kept])
    unit = torch.nn.functional.normalize(features, dim=-1)
    for row in range(2):
        targets = kept[row].nonzero()[:, 0]
        if not len(targets):
            assert torch.equal(merged[row], features[row])
            continue
        nearest = targets[(unit[row] @ unit[row, targets].T).argmax(1)]
        nearest = torch.where(kept[row], torch.arange(12), nearest)
        size = torch.bincount(nearest, minlength=12).float()
        assert int(size.sum()) == 12
        mass = (merged[row] * size[:, None]).sum(0)
        torch.testing.assert_close(mass, features[row].sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["apet", "visionzip"])
def test_merged_tokens_reach_the_prompt_and_others_stay(vlm, name):
    encoded = encode(vlm.model, ask(vlm, [0]))
    scorer = make_scorer(name)
    merged = reduce(encoded, scorer, 0.3)

    class Plain:
        name, needs_cls_attention, scope, adaptive = (
            scorer.name,
            scorer.needs_cls_attention,
            scorer.scope,
            False,
        )

        def __call__(self, features):
            return scorer(features)

    plain = reduce(encoded, Plain(), 0.3)
    assert torch.equal(merged.kept, plain.kept)
    text = ~plain.visual | plain.newlines
    assert torch.equal(merged["inputs_embeds"][text], plain["inputs_embeds"][text])
    changed = (merged["inputs_embeds"] != plain["inputs_embeds"]).any(-1)[0]
    cells = (plain.visual & ~plain.newlines)[0]
    assert 0 < int(changed.sum()) < int(cells.sum()) or (name == "apet" and bool(changed.any()))


def test_visionzip_keeps_54_dominant_tokens_of_64_and_merges_into_the_others_alone():
    features = Features(
        tokens(0, 1, 576, 8), cls_attention=torch.rand(1, 576, generator=torch.Generator().manual_seed(1))
    )
    scorer = make_scorer("visionzip")
    dominant, contextual = scorer._times(features)
    kept = top_fraction(scorer(features), 64 / 576)
    roles = [int((kept & (one < two)).sum()) for one, two in ((dominant, contextual), (contextual, dominant))]
    assert sum(roles) == 64 and roles[1] == pytest.approx(10, abs=2)
    merged = scorer.merge(features, kept)
    changed = (merged != features.tokens).any(-1)
    assert bool(changed.any()) and not bool((changed & ~(kept & (contextual < dominant))).any())
    best = features.cls_attention[0].topk(54).indices
    assert bool(kept[0, best].all())


# CDPruner


@given(seed=st.integers(0, 10**6), count=st.integers(2, 8))
@settings(deadline=None, max_examples=15)
def test_cdpruner_takes_what_adds_most_to_the_determinant(seed, count):
    features = tokens(seed, 1, count)
    relevance = torch.rand(1, count, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    scale = relevance[0].double()
    kernel = scale[:, None] * (unit @ unit.T) * scale[None, :]
    taken: list[int] = []
    for _ in range(count):
        rest = [i for i in range(count) if i not in taken]
        grows = [float(torch.linalg.det(kernel[[*taken, i]][:, [*taken, i]])) for i in rest]
        taken.append(rest[int(torch.tensor(grows).argmax())])
    assert greedy_order(features, relevance)[0].tolist() == taken


def test_cdpruner_needs_diversity_and_relevance_and_orders_what_spans_nothing_new():
    # three copies of one token and one other: the copies come last, though they are more relevant
    plane = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    relevance = torch.tensor([[0.7, 1.0, 0.8, 0.5]])
    assert greedy_order(plane, relevance)[0].tolist() == [1, 3, 2, 0]
    valid = torch.tensor([[True, False, True, True]])
    assert greedy_order(plane, relevance, valid)[0].tolist() == [2, 3, 0, 1]
    with pytest.raises(TokenselError, match=r"needs Features\.relevance"):
        make_scorer("cdpruner")(Features(tokens(0)))


def test_cdpruner_sees_the_question(vlm):
    kept = []
    for question in ("what?", "zebra crossing"):
        batch = Batch(vlm, [noise_image(40, 48)], [question])
        kept.append(prepare(batch, "cdpruner", 0.2).kept)
        relevance = batch.seeing.relevance
        assert relevance.shape == batch.seeing.features.tokens.shape[:2]
        assert bool((relevance.abs() <= 1).all())
    assert not torch.equal(*kept)


# keep the lowest, pooling


def test_the_lowest_are_what_a_scorer_would_keep_last(vlm):
    batch = Batch(vlm, [noise_image(40, 48)], ["what?"], [1])
    whole = prepare(batch, "full", 1.0).kept
    best, worst = (prepare(batch, name, 0.5).kept for name in ("norm", "lowest-norm"))
    assert not bool((best & worst).any()) and torch.equal(best | worst, whole)
    for name in SCORERS:
        row = check_method(LOWEST + name)
        assert row.scorer == LOWEST + name and row.chooses and Lowest in row.classes()
        assert row.needs_cls_attention == check_method(name).needs_cls_attention
    assert check_method("lowest-cls+fastv").schedule == "fastv" and check_method("lowest-random").uses_seed
    assert not hasattr(make_scorer("lowest-apet"), "merge")
    for wrong in ("lowest-full", "lowest-", "lowest-lowest-norm", "norm+lowest-norm"):
        with pytest.raises(TokenselError, match="is unknown"):
            check_method(wrong)


def test_pooling_by_2_keeps_a_quarter_and_the_mean_of_every_tile(vlm):
    class Mean(torch.nn.Module):
        """A projector that lets features through."""

        def forward(self, features):
            return features

    batch = Batch(vlm, [noise_image(24, 24)], ["what?"])
    encoded = batch.seeing
    projector = encoded.core.multi_modal_projector
    try:
        encoded.core.multi_modal_projector = Mean()
        pooled = pool(encoded, 0.25, newline="drop")
    finally:
        encoded.core.multi_modal_projector = projector
    features = encoded.features.tokens[0].view(3, 2, 3, 2, WIDTH).mean((1, 3)).flatten(0, 1)
    cells = pooled["inputs_embeds"][0][pooled.visual[0]]
    assert int(pooled.n_visual) == len(cells) and pooled.cells == 36
    torch.testing.assert_close(cells[:9], features)
    torch.testing.assert_close(cells[:9].mean(0), encoded.features.tokens[0].mean(0))
    assert torch.equal(
        prepare(batch, "pool", 1.0)["inputs_embeds"], prepare(batch, "full", 1.0)["inputs_embeds"]
    )
