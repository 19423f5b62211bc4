"""What a GPU does: the answers of a CPU, every training, an evaluation. `make gpu` runs it.

Choices are compared with those of the CPU, in float32. Two scores that differ by rounding may change places,
so that a few tokens may differ, not many.
"""

from dataclasses import replace

import pytest
import suite_tiny
import torch
from little import clip_tower, sample_images, small_config
from tiny import ask, noise_image, onevision_processor, tiny_learned, tiny_onevision, tiny_selector, tiny_vlm

from tokensel.benchmarks.runner import evaluate
from tokensel.book.mini.interpolation import WAYS, interpolated
from tokensel.data.encoders import VisionEncoder
from tokensel.methods import Batch, methods, prepare
from tokensel.scorers import LEARNED, make_scorer
from tokensel.training.answers import train_answers
from tokensel.training.config import AnswersConfig, DyRateConfig
from tokensel.training.dyrate import train_dyrate
from tokensel.training.finetune import finetune
from tokensel.training.finetune_config import FinetuneConfig
from tokensel.training.train import train
from tokensel.vlm import Vlm, encode, load_vlm
from tokensel.vlm.native import switch_off

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not by `make gpu`")

IMAGES = [noise_image(40, 48), noise_image(30, 90, seed=1)]
QUESTIONS = ["what?", "and what is this?"]


def first_logits(vlm: Vlm, method: str, device: str, keep: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens a method keeps, and the logits of the first token."""
    vlm.model.to(device)
    scorer = make_scorer(method, **tiny_learned(device)) if method in LEARNED else None
    reduced = prepare(Batch(vlm, IMAGES, QUESTIONS, [1, 2]), method, keep, scorer=scorer)
    with torch.no_grad():
        out = vlm.model(**reduced, logits_to_keep=1).logits[:, -1]
    return reduced.n_visual, out.cpu()


@pytest.mark.parametrize("method", [name for name in methods() if name != "native"])
def test_a_method_keeps_as_many_and_gives_the_same_logits(method):
    vlm = tiny_vlm()
    there, ours = first_logits(vlm, method, "cuda", 0.3)
    here, reference = first_logits(vlm, method, "cpu", 0.3)
    assert there.tolist() == here.tolist()
    assert torch.allclose(ours, reference, atol=1e-3)


@pytest.mark.parametrize("name", WAYS)
def test_interpolation_and_selection_leave_the_same_embeddings(name):
    model, processor = tiny_onevision("anyres_max_2"), onevision_processor(ratio="anyres_max_2")
    vlm, embeds = Vlm(model, processor, "tiny", switch_off(model, processor)), {}
    for device in ("cuda", "cpu"):
        vlm.model.to(device)
        scorer = make_scorer("selector", selector=tiny_selector().to(device))
        reduced = interpolated(encode(vlm.model, ask(vlm, [0, 1, None])), scorer, 0.3, WAYS[name])
        embeds[device] = reduced["inputs_embeds"].cpu()
    assert torch.allclose(embeds["cuda"], embeds["cpu"], atol=1e-4)


def asked(model, tmp_path, kind, **more):
    return kind(
        model=str(model), out=str(tmp_path / "out"), suite="suite_tiny", benchmarks=("page", "list"),
        n=6, steps=4, batch_size=3, save_every=2, progress=False, **more,
    )  # fmt: skip


@pytest.mark.parametrize("gradient", ["all-rates", "straight-through"])
def test_dyrate_learns(gradient, model, tmp_path):
    config = asked(model, tmp_path, DyRateConfig, layer=1, rates=4, gradient=gradient)
    _, history = train_dyrate(config)
    _, reference = train_dyrate(replace(config, device="cpu", out=str(tmp_path / "cpu")))
    assert [record["loss"] for record in history] == pytest.approx(
        [record["loss"] for record in reference], abs=1e-2
    )


@pytest.mark.parametrize("scorer", ["diffprune", "visionselector"])
def test_scorers_learn_by_answers(scorer, model, tmp_path):
    config = asked(model, tmp_path, AnswersConfig, scorer=scorer)
    _, history = train_answers(config)
    _, reference = train_answers(replace(config, device="cpu", out=str(tmp_path / "cpu")))
    assert history[-1]["loss"] == pytest.approx(reference[-1]["loss"], abs=1e-2)


@pytest.mark.parametrize("lora", [None, 2])
def test_the_language_model_learns(lora, model, tmp_path):
    selector = str(model.parent / "selector")
    config = asked(model, tmp_path, FinetuneConfig, selector=selector, keep=0.2, keep_most=0.7, lora=lora)
    finetune(config)
    assert load_vlm(tmp_path / "out" / "model", device="cuda").model.device.type == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_selector_learns(precision, tmp_path):
    clip_tower(tmp_path / "tower")
    trained = train(
        small_config(out=str(tmp_path / "out"), precision=precision),
        images=sample_images(6), encoder=VisionEncoder.from_pretrained(tmp_path / "tower"),
    )  # fmt: skip
    assert all(record["loss"] == record["loss"] for record in trained.history)


def test_an_evaluation_gives_the_same_answers_and_says_where(config, tmp_path):
    every = tuple(name for name in methods() if name not in ("native", "dyrate"))
    config = replace(config, methods=every, keeps=(0.3,), n=4, compare=(), dtype="float32")
    found = []
    for device in ("cuda", "cpu"):
        done = evaluate(replace(config, device=device, out=str(tmp_path / device)), progress=False)
        records = suite_tiny.answers(tmp_path / device)
        assert {record["versions"]["device"].startswith("cpu") for record in records.values()} == {
            device == "cpu"
        }
        assert done.table is not None
        found.append({key: record["prediction"] for key, record in records.items()})
    same = [found[0][key] == found[1][key] for key in found[1]]
    assert len(same) > 200 and sum(same) >= 0.95 * len(same)
