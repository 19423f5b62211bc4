"""The vision tower is shared: running it changes nothing in it, not even for a moment."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import dispatch_model
from little import VISION
from tiny import scale_up, tiny_llava
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from tokensel.data.encoders import VisionEncoder
from tokensel.data.tower import encoder_layers, run_tower


def tower_of(kind="clip", layers=4):
    torch.manual_seed(0)
    shape = VISION | {"num_hidden_layers": layers}
    if kind == "clip":
        tower = CLIPVisionModel(CLIPVisionConfig(**shape))
    else:
        tower = SiglipVisionModel(SiglipVisionConfig(**shape, vision_use_head=False))
    scale_up(tower)
    return tower.eval()


def pixels(seed=0, count=3):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def switching():
    """Threads take turns after microseconds, so that they meet in the middle of everything."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_that_share_a_tower_get_the_features_that_each_would_get_alone(threads, switching):
    tower = tower_of()
    tasks = [(pixels(i), (-2, 1, -1, [1, -1])[i % 4], i % 2 == 0) for i in range(60)]

    def features(task):
        images, layer, drop_cls = task
        tokens, attention = run_tower(tower, images, layer, drop_cls)
        return tokens, attention() if attention else tokens

    alone = [features(task) for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        together = list(pool.map(features, tasks))
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_a_language_model_in_another_thread_does_not_notice(switching):
    model, processor = tiny_llava()
    encoder = VisionEncoder.from_vlm(model, processor)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))

    def stock(_):
        with torch.no_grad():
            return model.model.vision_tower(images).last_hidden_state

    expected, features = stock(0), encoder.features(images).tokens
    with ThreadPoolExecutor(2) as pool:
        ours = pool.map(lambda _: encoder.features(images).tokens, range(30))
        theirs = pool.map(stock, range(30))
        assert all(torch.equal(tokens, features) for tokens in ours)
        assert all(torch.equal(states, expected) for states in theirs)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_running_a_tower_leaves_nothing_in_it(kind):
    tower = tower_of(kind)
    tower.config.output_hidden_states = True  # for which transformers would install hooks
    modules = {name: (id(module), dict(vars(module))) for name, module in tower.named_modules()}
    submodules = {name: dict(module._modules) for name, module in tower.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in tower.named_modules()}
    run_tower(tower, pixels(), -2, kind == "clip")
    assert modules == {name: (id(module), dict(vars(module))) for name, module in tower.named_modules()}
    assert submodules == {name: dict(module._modules) for name, module in tower.named_modules()}
    assert hooks == {name: len(module._forward_hooks) for name, module in tower.named_modules()}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [1, 2, -1, -2, [1, 3], [-1, 2]])
def test_features_are_the_hidden_states_of_the_stock_tower(kind, layer):
    tower = tower_of(kind)
    with torch.no_grad():
        states = tower(pixels(), output_hidden_states=True).hidden_states
    wanted = [layer] if isinstance(layer, int) else layer
    assert torch.equal(
        run_tower(tower, pixels(), layer, False)[0], torch.cat([states[i] for i in wanted], dim=-1)
    )


def test_layers_after_the_last_one_read_are_not_run():
    tower, ran = tower_of(), []
    for number, layer in enumerate(encoder_layers(tower)[1], 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    run_tower(tower, pixels(), 2, True)
    assert ran == [1, 2]  # and hooks of the caller's are run


def test_a_tower_that_accelerate_spread_over_devices_is_run_as_it_is():
    tower = tower_of()
    expected = run_tower(tower, pixels(), -2, True)[0]
    spread = copy.deepcopy(tower)
    path, layers = encoder_layers(spread)
    names = [name for name, _ in spread.named_children() if not path.startswith(name)]
    parent = path.rpartition(".")[0]
    device_map = dict.fromkeys(names, "cpu") | {f"{path}.{i}": "cpu" for i in range(len(layers))}
    assert parent
    dispatch_model(spread, device_map, main_device="cpu", force_hooks=True)
    calls = []
    hook = layers[2]._hf_hook  # of the layer whose output is read
    before = hook.pre_forward
    hook.pre_forward = lambda module, *args, **kwargs: calls.append(module) or before(module, *args, **kwargs)
    assert torch.equal(run_tower(spread, pixels(), -2, True)[0], expected)
    assert len(calls) == 1
