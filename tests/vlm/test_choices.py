"""What the paper leaves open: budget, thumbnail, newlines, the selector's own threshold."""

import ast
import inspect
import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import GivenScores, ask, tiny_vlm

from tokensel import cli
from tokensel.benchmarks.config import EvalConfig
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Choices, Vlm, downsample, encode, reduce
from tokensel.vlm.choose import add_newlines, choose_cells


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    return tiny_vlm()


def test_counts_follow_the_budget(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, [1, 2], None, 3]))
    layout, scorer = encoded.layout, make_scorer("random")
    cells = torch.bincount(layout.image[layout.cell])
    for keep in (0.01, 0.1, 0.3, 0.5, 0.9, 1.0):
        wanted = [max(1, round(keep * n)) for n in cells.tolist()]
        for budget, thumbnail in product(("image", "tile"), ("compete", "keep", "last", "drop")):
            chosen = choose_cells(layout, encoded.score(scorer), keep, Choices(budget, thumbnail))
            counts = torch.bincount(layout.image[chosen], minlength=4).tolist()
            small = torch.bincount(layout.image[layout.thumbnail], minlength=4).tolist()
            room = [n - t if thumbnail == "drop" else n for n, t in zip(cells.tolist(), small, strict=True)]
            assert counts == [min(w, r) for w, r in zip(wanted, room, strict=True)]
            assert not (chosen & ~layout.cell).any()
            small_kept = torch.bincount(layout.image[chosen & layout.thumbnail], minlength=4).tolist()
            if thumbnail == "drop":
                assert small_kept == [0, 0, 0, 0]
            if thumbnail == "keep":
                assert small_kept == [min(w, t) for w, t in zip(wanted, small, strict=True)]
            if thumbnail == "last":
                pages = [n - t for n, t in zip(cells.tolist(), small, strict=True)]
                assert small_kept == [max(w - p, 0) for w, p in zip(wanted, pages, strict=True)]


def test_a_budget_per_tile_gives_every_tile_its_share(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, 3]))
    tiles, tokens = encoded.features.tokens.shape[:2]
    scorer = GivenScores(torch.arange(tiles * tokens).view(tiles, tokens).float())  # later tiles score higher
    share = reduce(encoded, scorer, 0.25, budget="tile", thumbnail="compete").kept.sum(1)
    exact = encoded.layout.valid.sum(1) * 0.25
    assert ((share - exact).abs() <= 1).all()
    greedy = reduce(encoded, scorer, 0.25, budget="image", thumbnail="compete").kept.sum(1)
    assert greedy[0] == 0 and greedy.sum() == share.sum()


def test_newlines_of_rows_stay_with_their_rows(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, [1, 2]]))
    layout = encoded.layout
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        cells = (torch.rand(len(layout.source), generator=generator) > 0.93) & layout.cell
        kept = add_newlines(layout, cells, "row")
        row_has_cell = False
        for i in range(len(layout.source)):  # the rule, one token at a time
            if layout.cell[i]:
                assert kept[i] == cells[i]
                row_has_cell |= bool(cells[i]) and not bool(layout.thumbnail[i])
            else:
                assert bool(kept[i]) == row_has_cell
                row_has_cell = False
        assert torch.equal(add_newlines(layout, cells, "drop"), cells)
        assert torch.equal(add_newlines(layout, cells, "keep"), cells | ~layout.cell)


def test_the_adaptive_mask_keeps_what_scores_above_zero(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, 1]))
    scores = torch.randn(encoded.features.tokens.shape[:2], generator=torch.Generator().manual_seed(0)) - 0.5
    reduced = reduce(encoded, GivenScores(scores), None)
    assert torch.equal(reduced.kept, (scores > 0) & encoded.layout.valid)
    assert reduce(encoded, GivenScores(scores - 100), None).n_visual.tolist() == [0, 0]
    with pytest.raises(TokenselError, match="'norm' has no threshold of its own: give keep"):
        reduce(encoded, make_scorer("norm"), None)


def test_one_threshold_for_all_images_keeps_more_of_the_fuller_one(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, 1]))
    scores = torch.rand(encoded.features.tokens.shape[:2], generator=torch.Generator().manual_seed(0))
    scores[: encoded.layout.tiles[0]] += 0.4  # the first image has more to show
    scorer = GivenScores(scores)
    scorer.threshold = lambda keep: 1 - keep
    reduced = reduce(encoded, scorer, 0.3, budget="threshold")
    assert torch.equal(reduced.kept, (scores > 0.7) & encoded.layout.valid)
    shares = reduced.n_visual / reduced.n_visual_full
    assert shares[0] > shares[1] + 0.2
    whole = reduce(encoded, scorer, 1.0, budget="threshold")
    assert torch.equal(whole.n_visual, whole.n_visual_full)
    with pytest.raises(TokenselError, match="'norm' has no threshold: choose budget image or tile"):
        reduce(encoded, make_scorer("norm"), 0.3, budget="threshold")
    with pytest.raises(TokenselError, match=r"keep is 1\.2: give a fraction in \(0, 1\]"):
        reduce(encoded, scorer, 1.2, budget="threshold")


def test_scores_are_computed_once(vlm):
    encoded, calls = encode(vlm.model, ask(vlm, [0])), []
    scorer = GivenScores(torch.rand(encoded.features.tokens.shape[:2]))
    scorer.__class__ = type(
        "Counted", (GivenScores,), {"__call__": lambda self, f: calls.append(1) or self.scores}
    )
    for keep in (0.1, 0.5):
        reduce(encoded, scorer, keep)
    assert len(calls) == 1


def test_only_kept_tokens_are_projected(vlm):
    encoded, sizes = encode(vlm.model, ask(vlm, [0, 1])), []
    projector = vlm.model.model.multi_modal_projector
    handle = projector.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[:-1].numel()))
    reduced = reduce(encoded, make_scorer("norm"), 0.3)
    handle.remove()
    assert sizes == [int(reduced.n_visual.sum())]


def test_diversity_ranges_over_all_tokens_of_an_image(vlm):
    encoded = encode(vlm.model, ask(vlm, [0, 3]))
    scorer = make_scorer("diversity")
    _, _, features = encoded.by_image()
    assert features.valid.sum(1).tolist() == encoded.n_visual.tolist()
    first = int(encoded.n_visual[0])
    alone = encode(vlm.model, ask(vlm, [0]))
    torch.testing.assert_close(
        features.tokens[0, :first], alone.by_image()[2].tokens[0], atol=1e-5, rtol=1e-5
    )
    best = encoded.score(scorer)[encoded.layout.cell & (encoded.layout.image == 0)].argsort(descending=True)
    alone_best = alone.score(scorer)[alone.layout.cell].argsort(descending=True)
    assert best[:50].tolist() == alone_best[:50].tolist()


# Bad input


def test_what_does_not_fit_is_refused_in_one_line(vlm):
    inputs = ask(vlm, [0, 1])
    encoded = encode(vlm.model, inputs)
    norm = make_scorer("norm")
    for keep in (0.0, 1.5, float("nan"), -1.0):
        with pytest.raises(TokenselError, match="keep is"):
            reduce(encoded, norm, keep)
        with pytest.raises(TokenselError, match="keep is"):
            downsample(encoded, keep)
    with pytest.raises(TokenselError, match="no scorer to rank"):
        reduce(encoded, None, 0.5)
    with pytest.raises(TokenselError, match="'budgets' is not an option: choose among budget, thumbnail"):
        reduce(encoded, norm, 0.5, budgets="tile")
    with pytest.raises(TokenselError, match="newline is 'maybe': choose one of keep, drop, row"):
        reduce(encoded, norm, 0.5, newline="maybe")
    with pytest.raises(TokenselError, match="width 64, these have 32"):
        reduce(encoded, make_scorer("selector", selector=TokenSelector(SelectorConfig(width=64))), 0.5)
    with pytest.raises(TokenselError, match="3 keys for 2 rows"):
        encode(vlm.model, inputs, keys=[1, 2, 3])
    cut = dict(inputs) | {
        "input_ids": inputs["input_ids"][:, 60:],
        "attention_mask": inputs["attention_mask"][:, 60:],
    }
    with pytest.raises(TokenselError, match="image placeholders in input_ids, but the images give"):
        encode(vlm.model, cut)
    with pytest.raises(TokenselError, match="is none of the families known here"):
        encode(vlm.model.model.language_model, inputs)
    with pytest.raises(TokenselError, match="2 rows of images for 1 prompts"):
        vlm.inputs([None, None], ["x"])


def test_the_defaults_are_the_same_wherever_they_are_written():
    assert EvalConfig(model="m", suite="s", methods=("full",)).choices() == vars(Choices())
    options = inspect.signature(cli.evaluate).parameters
    assert {name: options[name].default for name in vars(Choices())} == vars(Choices())


def test_chapters_name_the_thumbnail_that_was_measured_for_them():
    """The library's default is another, so that a call that leaves it out would change the book's numbers."""
    assert Choices().thumbnail == "compete"
    calls = 0
    for path in sorted(Path("chapters").glob("*.ipynb")):
        if path.name.startswith(("13", "16")):  # about the reader's own model, with the library's default
            continue
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or not re.search(r"EvalConfig\(|reduce\(|reduce_inputs\(", source):
                continue
            for node in ast.walk(ast.parse(source)):
                name = getattr(getattr(node, "func", None), "id", None)
                chooses = name == "EvalConfig" or (
                    name in ("reduce", "reduce_inputs") and len(node.args) + len(node.keywords) > 2
                )
                if not chooses:
                    continue
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if options.get("keep") != "None":  # then the selector decides, and no budget is shared
                    calls += 1
                    assert "thumbnail" in options, (path, ast.unparse(node))
    assert calls > 10
