"""Metrics of the reconstruction: each measures what its name says, and a training takes any of them."""

import pytest
import torch
from little import random_features, same, sample_images, save_images, small_config, weights
from tiny import WIDTH, logits, noise_image, tiny_llava, tiny_vlm

import tokensel.training.reader as reader
from tokensel.data.encoders import VisionEncoder
from tokensel.training.config import TrainConfig
from tokensel.training.metrics import METRICS, MetricSource, make_metric
from tokensel.training.reader import answer_gradients, reader_sensitivity
from tokensel.training.train import train
from tokensel.utils.errors import TokenselError
from tokensel.vlm.encode import encode
from tokensel.vlm.forced import force
from tokensel.vlm.reduce import assemble, reduce

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaVA with its processor as a folder."""
    path = tmp_path_factory.mktemp("llava")
    model, processor = tiny_llava()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def source_of(vlm=None, width=WIDTH, sensitivity=None):
    features = random_features(width=width)
    features.tokens = features.tokens @ torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    return MetricSource(lambda: [features], lambda: vlm, lambda: sensitivity), features.tokens


def test_channels_get_the_same_variance():
    source, tokens = source_of()
    measured = make_metric("channel", source, CPU)(tokens)
    assert torch.allclose(measured.flatten(0, 1).std(0), torch.ones(WIDTH), atol=0.01)


def test_whitened_channels_are_uncorrelated():
    source, tokens = source_of()
    covariance = torch.cov(make_metric("whitened", source, CPU)(tokens).flatten(0, 1).T)
    off = covariance - covariance.diagonal().diag()
    assert off.abs().max() < 1e-3 and (covariance.diagonal() <= 1.01).all()
    assert covariance.diagonal().median() > 0.9  # only directions that hardly vary count less


def test_the_length_of_a_token_does_not_count_by_token():
    source, tokens = source_of()
    metric = make_metric("token", source, CPU)
    assert torch.allclose(metric(5 * tokens + 3), metric(tokens), atol=1e-4)
    assert torch.allclose(metric(tokens).norm(dim=-1), torch.full(tokens.shape[:2], WIDTH**0.5), rtol=1e-3)


def test_projector_and_keys_and_values_are_the_models_own(vlm):
    source, tokens = source_of(vlm)
    embeds = vlm.model.model.multi_modal_projector(tokens)
    assert torch.equal(make_metric("projector", source, CPU)(tokens), embeds)
    seen = {}
    attention = vlm.model.model.language_model.layers[0].self_attn
    hooks = [
        getattr(attention, name).register_forward_hook(lambda *call, name=name: seen.update({name: call[-1]}))
        for name in ("k_proj", "v_proj")
    ]
    try:
        vlm.model.model.language_model(inputs_embeds=embeds)
    finally:
        for hook in hooks:
            hook.remove()
    measured = make_metric("keys-values", source, CPU)(tokens)
    assert torch.allclose(measured, torch.cat([seen["k_proj"], seen["v_proj"]], -1), atol=1e-5)


def test_a_model_without_a_projector_apart_is_refused():
    vlm = tiny_vlm()
    del vlm.model.model.multi_modal_projector  # as in families whose tower merges and projects in one
    with pytest.raises(TokenselError, match="a llava_next has no projector apart from its tower; choose"):
        make_metric("projector", source_of(vlm)[0], CPU)


def test_an_unknown_metric_is_refused():
    with pytest.raises(TokenselError, match=r"metric is 'cosine': choose one of features, channel"):
        make_metric("cosine", source_of()[0], CPU)


def answer_loss(vlm, image, prompt, shift):
    """Negative log-likelihood of the model's own answer when every token is shifted, and the real tokens."""
    encoded = encode(vlm.model, vlm.inputs([image], [vlm.prompt(prompt)]))
    reduced = reduce(encoded)
    output = vlm.generate_output(reduced, 6)
    everything = torch.ones(len(encoded.layout.source), dtype=torch.bool)
    visual = encoded.family.project(encoded, everything, encoded.features.tokens + shift)
    inputs, *_ = assemble(encoded, everything, visual, "compact")
    forced = force(vlm.model, reduced | inputs, output.tokens, output.lengths)
    predicted = logits(vlm.model, forced.inputs)[:, -forced.steps :].double().log_softmax(-1)
    right = predicted.gather(2, forced.labels.clamp(min=0)[..., None])[..., 0]
    return -(right * (forced.labels >= 0)).sum(), encoded.layout.valid


def test_the_gradient_of_an_answer_is_that_of_finite_differences(vlm):
    image = noise_image(40, 48)
    gradients = answer_gradients(vlm, [image], ["what?"], 6)
    step = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)) * 1e-2
    ahead, valid = answer_loss(vlm, image, "what?", step)
    behind, _ = answer_loss(vlm, image, "what?", -step)
    assert len(gradients) == valid.sum()
    # padding is shifted too, and reaches no answer
    assert torch.isclose((gradients @ step).sum().double(), (ahead - behind) / 2, rtol=0.02)


def test_the_sensitivity_is_the_root_of_the_mean_outer_product(vlm):
    images, prompts = [noise_image(40, 48), noise_image(30, 90, 1)], ["what?", "where?"]
    matrix = reader_sensitivity(vlm, images, prompts, max_new_tokens=6, batch_size=3)
    rows = torch.cat([answer_gradients(vlm, [i], [p], 6) for i in images for p in prompts])
    assert torch.allclose(matrix @ matrix, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-6)
    error = torch.randn(WIDTH)
    assert torch.isclose((error @ matrix).norm(), (rows @ error).square().mean().sqrt(), rtol=1e-3)


def test_the_reader_does_not_count_what_the_projector_cannot_see():
    vlm = tiny_vlm()
    blind = torch.nn.functional.normalize(torch.randn(WIDTH), dim=0)
    weight = vlm.model.model.multi_modal_projector.linear_1.weight
    with torch.no_grad():
        weight -= torch.outer(weight @ blind, blind)
    matrix = reader_sensitivity(vlm, [noise_image(40, 48)], ["what?"], max_new_tokens=4)
    assert (blind @ matrix).norm() < 1e-3 * matrix.norm()


def test_a_sensitivity_needs_images_and_prompts(vlm):
    with pytest.raises(TokenselError, match="no image or no prompt: give at least one of each"):
        reader_sensitivity(vlm, [noise_image(40, 48)], [])


@pytest.mark.parametrize("name", METRICS)
def test_a_training_takes_every_metric(checkpoint, tmp_path, name):
    config = small_config(
        images=str(save_images(tmp_path / "images")),
        encoder=str(checkpoint),
        metric=name,
        metric_images=2,
        gate="gumbel",
        out=str(tmp_path / "out"),
    )
    trained = train(config)
    # under this gate an untrained reconstructor returns the mean at dropped tokens: its error is at most
    # about the scale
    assert all(0 < record["l_rec"] < 1.5 for record in trained.history)
    assert trained.selector.config.metric == name
    assert (tmp_path / "out" / "reader.safetensors").exists() == (name == "reader")


def test_the_metric_is_the_projectors_where_there_is_one(checkpoint, tmp_path):
    config = small_config(images=str(save_images(tmp_path / "images")), metric_images=2, steps=1)
    left_open = train(TrainConfig.from_dict(config.to_dict() | {"encoder": str(checkpoint)}))
    assert left_open.selector.config.metric == "projector"
    encoder = VisionEncoder.from_pretrained(checkpoint)
    encoder.read_by = ""  # a tower alone
    assert train(config, encoder=encoder).selector.config.metric == "features"
    assert train(small_config(steps=1), features=random_features()).selector.config.metric == "features"


def test_a_sensitivity_is_measured_once(checkpoint, tmp_path, monkeypatch):
    """The same folder gives the same training; another prompt measures it anew."""
    calls = []
    real = reader.reader_sensitivity
    monkeypatch.setattr(
        reader, "reader_sensitivity", lambda *given, **more: calls.append(given) or real(*given, **more)
    )
    images = str(save_images(tmp_path / "images"))
    options = dict(images=images, encoder=str(checkpoint), metric="reader", metric_images=2)
    first = train(small_config(**options, out=str(tmp_path / "out")))
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    again = train(small_config(**options, out=str(tmp_path / "out")))
    assert len(calls) == 1 and same(weights(first), weights(again))
    (tmp_path / "out" / "checkpoint.safetensors").unlink()
    train(small_config(**options, out=str(tmp_path / "out"), metric_prompts=("Who?",)))
    assert len(calls) == 2


def test_a_metric_that_needs_a_model_or_images_says_so(checkpoint, tmp_path):
    encoder = VisionEncoder.from_pretrained(checkpoint)
    config = small_config(metric="reader", metric_images=2)
    with pytest.raises(TokenselError, match="metric 'reader' is measured on images: give images"):
        train(config, features=random_features(width=WIDTH), encoder=encoder)
    encoder.read_by = ""
    with pytest.raises(TokenselError, match="metric 'reader' needs the language model that reads the feat"):
        train(config, images=sample_images(), encoder=encoder)
