"""The path from pixels to the prompt's embeddings on a device of its own: who waits for it, and what is
where.

PyTorch's "meta" device stands in for a GPU. Its tensors have no values, so that reading one on the host, as a
wait for the device would, raises, and so does an operation whose operands are on two devices.
"""

import pytest
import torch
from tiny import ask, tiny_learned, tiny_vlm
from torch.overrides import TorchFunctionMode

from tokensel.scorers import SCORERS, make_scorer
from tokensel.vlm import downsample, encode, reduce


class Fetches(TorchFunctionMode):
    """Gives values to what is fetched from the device by ``cpu()``, and counts how often that is done."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu and args[0].is_meta:
            self.count += 1
            return torch.rand(args[0].shape).to(args[0].dtype)
        return function(*args, **kwargs or {})


def test_values_cannot_be_read_nor_devices_mixed():
    tensor, here = torch.zeros(3, device="meta"), torch.zeros(3)
    reads = [
        lambda: tensor.sum().item(),
        lambda: bool((tensor > 0).any()),
        lambda: tensor.nonzero(),
        lambda: tensor[tensor > 0],
        lambda: torch.bincount(tensor.long()),
        lambda: tensor + here,
        lambda: torch.where(here > 0, tensor, 0.0),
    ]
    for read in reads:
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", [*SCORERS, "downsample", "full"])
def test_scores_are_all_that_the_host_waits_for(name, positions):
    vlm = tiny_vlm()
    inputs = dict(ask(vlm, [0, 1]))
    inputs["pixel_values"] = inputs["pixel_values"].to("meta")
    model, scorer = vlm.model.to("meta"), None
    if name in SCORERS:
        scorer = make_scorer(name, **tiny_learned("meta"))
    with Fetches() as fetches, torch.no_grad():
        encoded = encode(model, inputs)
        reduced = downsample(encoded, 0.3) if name == "downsample" else reduce(
            encoded, scorer, 0.3 if scorer else 1.0, positions=positions
        )  # fmt: skip
    assert fetches.count == (1 if scorer else 0)
    assert all(tensor.is_meta for tensor in (*reduced.values(), reduced.visual))
    assert reduced["inputs_embeds"].shape[:2] == reduced["attention_mask"].shape == reduced.visual.shape
    assert not reduced.n_visual.is_meta
