"""The processes of a training: no call decides about the next; one rule for where tensors live."""

import os
from types import SimpleNamespace

import pytest
import torch
from little import random_features, small_config
from tiny import tiny_selector
from torch import distributed
from torch.overrides import TorchFunctionMode

from tokensel.data.features import Features
from tokensel.model.objective import objective
from tokensel.model.reconstructor import ReconstructorConfig, TokenReconstructor
from tokensel.training.autoencoder import Autoencoder, MaskedAutoencoder, Statistics
from tokensel.training.judge import policy_scores, reconstruction_error, train_reconstructor
from tokensel.training.optim import adamw, use_bf16
from tokensel.training.processes import Processes, launched_processes
from tokensel.training.train import train, train_step
from tokensel.utils.errors import TokenselError

META = torch.device("meta")


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine with one accelerator; the "meta" device stands in for it."""
    gpu = SimpleNamespace(
        current_accelerator=lambda check_available: META,
        current_device_index=lambda: 0,
        device_count=lambda: 1,
    )
    monkeypatch.setattr("tokensel.training.processes.accelerator", gpu)


def devices_of_two_calls(first, second):
    with launched_processes(first) as processes:
        one = processes.device.type
    with launched_processes(second) as processes:
        return one, processes.device.type


def test_the_device_of_one_training_does_not_decide_that_of_the_next(one_gpu):
    assert devices_of_two_calls("cpu", "auto") == ("cpu", "meta")
    assert devices_of_two_calls("auto", "cpu") == ("meta", "cpu")
    train(small_config(device="cpu"), features=random_features())
    with launched_processes("auto") as processes:
        assert processes.device.type == "meta"
    # the judge trains where its features are, whatever was trained before
    features = random_features()
    masks = torch.ones(features.tokens.shape[:2], dtype=torch.bool)
    assert next(train_reconstructor(features, masks, small_config()).parameters()).device.type == "cpu"


def test_no_process_group_and_no_thread_count_is_left_behind():
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    train(small_config(), features=random_features())
    assert not distributed.is_initialized() and torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), generator)
    assert not torch.is_autocast_enabled("cpu")


def test_a_group_that_was_made_here_is_destroyed_and_the_callers_is_kept(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "1",
        "RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        train(small_config(), features=random_features())
        assert distributed.is_initialized()
    finally:
        distributed.destroy_process_group()


def test_more_processes_than_gpus_are_refused(one_gpu, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(TokenselError, match="start at most 1 processes"), launched_processes("auto"):
        pass
    assert os.environ["LOCAL_RANK"] == "1" and not distributed.is_initialized()


# --- where tensors live ----------------------------------------------------------------------------------
# The "meta" device stands in for a GPU: an operation on tensors of two devices raises, and so does reading a
# value on the host without fetching it by cpu().


class Fetches(TorchFunctionMode):
    """Gives values to what is fetched from the device by ``cpu()``."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu and args[0].is_meta:
            return torch.rand(args[0].shape).to(args[0].dtype)
        return function(*args, **kwargs or {})


def meta_features():
    return random_features(tiles=8).to(META)


def test_features_move_as_a_whole_and_rows_keep_the_device():
    features = random_features()
    features.valid = torch.ones(features.tokens.shape[:2], dtype=torch.bool)
    moved = features.to(META)
    assert moved.tokens.is_meta and moved.valid.is_meta and moved.keys.is_meta
    assert moved[:3].tokens.is_meta and moved[torch.arange(2, device=META)].tokens.is_meta
    assert moved.to(dtype=torch.bfloat16).valid.dtype == torch.bool


def test_a_training_step_stays_on_the_device():
    config = small_config(batch_size=8)
    model = Autoencoder(16, *config.shape).to(META)
    model.prepare_for(config.gate)
    values = train_step(Processes(META), model, adamw(model, config), meta_features(), 0, config, 1.0)
    assert values.is_meta and values.shape == (3,)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert learned and all(parameter.grad.is_meta for parameter in learned)


def test_models_and_objective_return_on_the_device_of_their_inputs():
    selector, features = tiny_selector(16).to(META), meta_features()
    reconstructor = TokenReconstructor(ReconstructorConfig(width=16, layers=1)).to(META)
    out = selector(features.tokens)
    results = [*out.to_tuple(), selector.scores(features.tokens), selector.hard_mask(features.tokens)]
    results += [reconstructor(out.selected)]  # a budget is not among them: it reads whether a score is NaN
    results += objective(reconstructor(out.selected), features.tokens, out.mask, 0.3, 1.0)
    assert all(result.is_meta for result in results)


def test_the_judge_stays_on_the_device_of_its_features():
    features = meta_features()
    masks = torch.ones(features.tokens.shape[:2], dtype=torch.bool, device=META)
    model = MaskedAutoencoder.new(16, 1).to(META)
    assert reconstruction_error(model, features, masks, batch_size=3).is_meta
    assert policy_scores(features, lambda part: part.tokens.norm(dim=-1), batch_size=3).is_meta
    assert not use_bf16(META, small_config())


def test_statistics_are_on_the_host_wherever_the_features_are():
    with Fetches():
        features = meta_features()
        features.valid = torch.ones(features.tokens.shape[:2], dtype=torch.bool, device=META)
        statistics = Statistics.of([features[:4], Features(features.tokens)])
    assert not statistics.mean.is_meta and not statistics.std.is_meta and statistics.scale > 0


@pytest.mark.parametrize("wrong", ["features", "noise"])
def test_mixed_devices_raise_and_are_not_silently_moved(wrong):
    selector = tiny_selector(16).to(META)
    tokens = random_features(tiles=2).tokens
    with pytest.raises((RuntimeError, NotImplementedError)):
        if wrong == "features":
            selector(tokens)
        else:
            selector(tokens.to(META), noise=torch.zeros(2, tokens.shape[1], 2))
