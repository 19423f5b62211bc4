"""Figures and the explorer where the model is on a device of its own; and that the stand-in is strict."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from stand_in import NAME, stand_in
from tiny import WIDTH, ask, noise_image, tiny_learned, tiny_vlm

from tokensel.book.explorer import Example, Exploration, embed, generation_steps
from tokensel.figures import overlays, style
from tokensel.schedules import Exponential, FastV, Vtw
from tokensel.scorers import make_scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.vlm import encode, reduce

EXAMPLES = [
    Example("wide", noise_image(24, 48, 1), "what?", ("x",)),
    Example("high", noise_image(90, 20, 2), "who?"),
]


@pytest.fixture
def device():
    with stand_in() as device:
        yield device
    plt.close("all")


@pytest.fixture
def here():
    """A model on the host, for the results that a device must not change."""
    return tiny_vlm()


@pytest.fixture
def there(device):
    vlm = tiny_vlm()
    vlm.model.to(device)
    return vlm


def test_devices_do_not_mix_and_values_are_fetched_only_by_name(device):
    there, host = torch.arange(6.0, device=device).view(2, 3), torch.ones(2, 3)
    assert (
        there.device.type == (there + 1).device.type == torch.tensor([1], device=device).device.type == NAME
    )
    refused = [
        lambda: there + host,
        lambda: torch.where(host > 0, there, 0.0),
        lambda: torch.isin(there, host),
        lambda: torch.cat([there, host]),
        lambda: host[there[0].long()],
        lambda: torch.nn.Linear(3, 1)(there),
        lambda: there.numpy(),
        lambda: np.asarray(there),
        lambda: there.masked_fill(host > 0, 0.0),
        lambda: there[0, 0].masked_fill(host[0, 0] > 0, 0.0),
        lambda: torch.equal(there, host),
        lambda: torch.stack([there[0, 0], host[0, 0]]),
        lambda: host[0, 0].clone().add_(there[0, 0]),
        lambda: there.index_put((torch.tensor([1]),), host[1]),
        lambda: there.gather(1, host.long()),
        lambda: torch.rand(2, device=device, generator=torch.Generator()),
        lambda: torch.rand_like(there).normal_(generator=torch.Generator()),
    ]
    for mix in refused:
        with pytest.raises((RuntimeError, TypeError)):
            mix()
    assert (there * torch.tensor(2.0)).cpu().tolist() == [[0, 2, 4], [6, 8, 10]], (
        "one number may be on the host"
    )
    assert there[torch.tensor([1])].tolist() == [[3, 4, 5]], "and an index"
    assert there[torch.tensor([False, True])].tolist() == [[3, 4, 5]], "or a mask that is one"
    assert there.masked_fill(there > 4, torch.tensor(7.0)).tolist() == [[0, 1, 2], [3, 4, 7]]
    assert torch.where(there > 4, torch.tensor(7.0), there)[1].tolist() == [3, 4, 7]
    there[torch.tensor([0])] = torch.tensor(0.5)
    assert there[0].tolist() == [0.5] * 3
    there[0, 0] = 9
    assert there.view(-1)[0].item() == 9 and bool((there > 8).any()) and there.sum().item() == 22
    host.copy_(there)
    assert host.device.type == "cpu" and host[0, 0] == 9


def test_gradients_and_optimisers_stay_on_the_device(device):
    layer = torch.nn.Linear(3, 1).to(device)
    before = layer.weight.detach().cpu().clone()
    layer(torch.ones(2, 3, device=device)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device.type == NAME
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()
    assert not torch.equal(layer.weight.detach().cpu(), before)


def parts(vlm):
    """A judge and scorers of three kinds: learned, drawn, and by a map of attention."""
    torch.manual_seed(0)
    judge = MaskedAutoencoder.new(WIDTH, layers=1, heads=4).eval()
    scorers = {name: make_scorer(name, **tiny_learned()) for name in ("selector", "random", "cls")}
    return vlm, EXAMPLES, scorers, judge


@pytest.mark.parametrize("judge_on", ["cpu", NAME])
def test_the_explorer_shows_the_same_on_any_device(here, there, judge_on):
    expected = Exploration(*parts(here), max_new_tokens=3).data([0.3], progress=False)
    vlm, examples, scorers, judge = parts(there)
    exploration = Exploration(vlm, examples, scorers, judge.to(judge_on), max_new_tokens=3)
    assert exploration.encoded.features.tokens.device.type == NAME
    shown = exploration.data([0.3], progress=False)
    assert json.loads(json.dumps(shown)) == json.loads(json.dumps(expected))
    assert "<img" in embed(shown)
    kept = torch.ones(exploration.encoded.features.tokens.shape[:2], dtype=torch.bool)
    assert exploration.errors(kept.to(NAME)).device.type == exploration.errors(kept).device.type == "cpu"


def test_the_explorer_of_an_answer_shows_the_same_on_any_device(here, there):
    schedules = {"fastv": FastV(1, 0.5), "vtw": Vtw(1), "exponential": Exponential(1, 0.7)}
    expected, shown = (generation_steps(vlm, EXAMPLES, schedules, 3, progress=False) for vlm in (here, there))
    assert shown == expected


def test_overlays_take_tensors_from_any_device(here, there, device):
    style.use()
    on_host, on_device = (encode(vlm.model, ask(vlm, [1, 3])) for vlm in (here, there))
    kept = reduce(on_host, make_scorer("norm"), 0.4).kept
    statistics = ((0.5,) * 3, (0.5,) * 3)
    for encoded, mask in (
        (on_host, kept),
        (on_device, kept),
        (on_device, kept.to(device)),
        (on_device, None),
    ):
        overlays.anyres(encoded, mask, statistics=statistics)
    one = overlays.tiled_image(on_device, 1, statistics)
    assert one.full.tobytes() == overlays.tiled_image(on_host, 1, statistics).full.tobytes()
    assert [part.device.type for part in one.maps(kept.to(device))] == [NAME, NAME]
    image, values = noise_image(8, 8), torch.rand(4, 4)
    mask = values > 0.5
    assert np.array_equal(
        overlays.veiled(image, mask.to(device), mask.to(device)), overlays.veiled(image, mask, mask)
    )
    overlays.gallery([("row", image, [mask.to(device)])], ["mask"])
    ax = plt.figure().add_subplot()
    overlays.show(ax, image, mask.to(device), real=mask.to(device))
    overlays.heat(ax, image, values.to(device))
    overlays.heat(ax, image, values.to(device), top=1.0)
    assert len(overlays.tile_images(torch.rand(2, 3, 8, 8, device=device), *statistics)) == 2


@pytest.mark.parametrize("columns_on", ["cpu", NAME])
def test_left_cells_join_columns_and_prompt_of_any_device(there, columns_on):
    encoded = encode(there.model, ask(there, [1]))
    prompt = reduce(encoded)
    assert prompt.visual.device.type == NAME
    left = prompt.visual[0].nonzero()[:3, 0].cpu()
    cells = overlays.left_cells(encoded, prompt.visual, left.to(columns_on))
    assert cells.device.type == "cpu" and int(cells.sum()) == 3


def test_the_code_of_a_chapter_runs_where_its_model_is_on_a_device():
    """Chapter 1; ``tests/run_on_stand_in.py`` runs the others, which takes minutes."""
    script = Path(__file__).parent / "run_on_stand_in.py"
    done = subprocess.run([sys.executable, script, "01"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "01: ok" in done.stdout and "01_handover: 0 operations" not in done.stdout
