"""Loading from a private repository, over several devices, quantised; and what cannot be loaded."""

import shutil
from functools import partial

import pytest
import torch
from huggingface_hub import hf_hub_download
from tiny import (
    ask,
    logits,
    noise_image,
    onevision_processor,
    tiny_learned,
    tiny_llava,
    tiny_onevision,
    tiny_selector,
    tiny_vlm,
)
from torch import nn

from tokensel.data.encoders import VisionEncoder
from tokensel.model.selector import TokenSelector
from tokensel.scorers import SCORERS, make_scorer
from tokensel.utils.devices import check_device, check_dtype, device_of
from tokensel.utils.errors import MissingPackageError, TokenselError
from tokensel.vlm import Vlm, downsample, encode, load_vlm, native, reduce, reduce_inputs

FAMILIES = ("llava-next", "llava-onevision")
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each family, and one of a selector."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        model, processor = (
            tiny_llava() if family == "llava-next" else (tiny_onevision(), onevision_processor())
        )
        model.save_pretrained(root / family)
        processor.save_pretrained(root / family)
    tiny_selector().save_pretrained(root / "selector")
    return root


# The Hub


@pytest.fixture
def private(folders, tmp_path, monkeypatch):
    """A cache that holds one revision of the models ``us/<name>``, and the requests to the Hub with their
    tokens.

    What asks for another revision, or in another cache, finds nothing there.
    """
    for name in (*FAMILIES, "selector"):
        repository = tmp_path / f"models--us--{name}"
        shutil.copytree(folders / name, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "v2").write_text(COMMIT)
    requests = []

    def info(self, name, *, timeout=None, revision=None, token=None):
        requests.append(("info", token, revision))

    def download(name, filename, **options):
        requests.append((filename, options["token"], options["revision"]))
        return hf_hub_download(name, filename, **options)

    monkeypatch.setattr("tokensel.utils.loading.HfApi.model_info", info)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", download)
    return {"cache_dir": tmp_path, "revision": "v2"}, requests


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("us/llava-next", partial(load_vlm, device="cpu")),
        ("us/llava-onevision", partial(load_vlm, device="cpu")),
        ("us/selector", TokenSelector.from_pretrained),
        ("us/llava-next", VisionEncoder.from_pretrained),
    ],
)
def test_token_revision_and_cache_reach_every_request(private, name, load):
    options, requests = private
    load(name, token="secret", **options)
    # a revision that transformers has resolved goes on by its commit
    assert requests[0] == ("info", "secret", "v2")
    assert {request[1:] for request in requests} <= {("secret", "v2"), ("secret", COMMIT)}
    requests.clear()
    load(name, local_files_only=True, **options)
    assert "info" not in {request[0] for request in requests}
    for missing in ("cache_dir", "revision"):
        with pytest.raises(TokenselError, match=name):
            load(name, local_files_only=True, **{key: options[key] for key in options if key != missing})


# Several devices


def spread(vlm: Vlm, **places: str) -> Vlm:
    """Put parts of a model on other devices: ``meta`` stands in for a GPU, on which mixing devices raises."""
    core = vlm.model.base_model
    for name, device in places.items():
        if name == "newline":
            core.image_newline = nn.Parameter(core.image_newline.to(device), requires_grad=False)
        else:
            part = {"projector": "multi_modal_projector", "embedding": "language_model"}[name]
            getattr(core, part).to(device)
    return vlm


@pytest.mark.parametrize(
    "meta", [("embedding",), ("projector", "embedding"), ("projector", "newline", "embedding")]
)
@torch.no_grad()
def test_tensors_follow_the_module_that_they_enter(meta):
    inputs = ask(tiny_vlm(), [0, None, 3])
    for scorer, keep in ((None, 1.0), (make_scorer("norm"), 0.3)):
        vlm = spread(tiny_vlm(), **dict.fromkeys(meta, "meta"))
        reduced = reduce_inputs(vlm.model, inputs, scorer, keep)
        wanted = "meta" if "embedding" in meta else "cpu"
        assert {tensor.device.type for tensor in (*reduced.values(), reduced.visual)} == {wanted}
        projector = device_of(vlm.model.base_model.multi_modal_projector)
        assert projector.type == ("meta" if "projector" in meta else "cpu")
        if keep < 1:
            assert downsample(encode(vlm.model, inputs), keep)["inputs_embeds"].device.type == wanted
    vlm = Vlm(tiny_onevision("anyres_max_1000"), onevision_processor(ratio="anyres_max_1000"), "tiny")
    inputs = ask(vlm, [0])
    encoded = encode(spread(vlm, **dict.fromkeys(meta, "meta")).model, inputs)
    assert native(encoded, "anyres_max_1")["inputs_embeds"].device.type == wanted


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # of a parameter
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_accelerate_spreads_answers_as_in_one_piece(folders, family, tmp_path):
    whole = load_vlm(folders / family, "cpu")
    # weights of the language model on the disk until they are needed: without its hooks they have no values
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.image_newline": "cpu",
    }
    device_map |= {"model.language_model": "disk", "lm_head": "cpu"}
    for places in ("auto", device_map):
        vlm = load_vlm(folders / family, device_map=places)
        reduced = [
            reduce_inputs(each.model, ask(each, [0, None]), make_scorer("norm"), 0.3) for each in (vlm, whole)
        ]
        assert torch.equal(reduced[0]["inputs_embeds"], reduced[1]["inputs_embeds"])
        assert vlm.generate(reduced[0], 4) == whole.generate(reduced[1], 4)
    assert device_of(vlm.model.base_model.multi_modal_projector).type == "cpu"
    with pytest.raises(TokenselError, match="device is 'cpu' and device_map 'auto': give one of them"):
        load_vlm(folders / family, "cpu", device_map="auto")


# Quantised weights


class Int8Linear(nn.Module):
    """A quantised linear layer as packages make them: its weight has no floating-point type."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer("weight", (linear.weight / self.scale).round().to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_keeps_working(folders, family):
    vlm = load_vlm(folders / family, "cpu")
    for module in list(vlm.model.base_model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    inputs = ask(vlm, [0, None])
    assert torch.equal(logits(vlm.model, reduce_inputs(vlm.model, inputs)), logits(vlm.model, inputs))
    encoded = encode(vlm.model, inputs)
    reads_cls = {name for name in SCORERS if getattr(SCORERS[name], "needs_cls_attention", False)}
    for name in set(SCORERS) - (reads_cls if family == "llava-onevision" else set()):
        reduced = reduce(encoded, make_scorer(name, **tiny_learned()), 0.3)
        assert reduced["inputs_embeds"].dtype == torch.float32 and len(vlm.generate(reduced, 3)) == 2


# What cannot be loaded


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is 'gpu': give cpu, cuda"),
        ("cuda:x", "device is 'cuda:x': give cpu, cuda"),
        ("", "device is ''"),
        ("cuda:99", "device is 'cuda:99', but PyTorch finds"),
    ],
)
def test_an_unknown_device_is_refused_in_one_line(folders, device, message):
    with pytest.raises(TokenselError, match=message):
        load_vlm(folders / "llava-next", device)
    assert check_device("auto") == check_device(None) and check_device("cpu") == torch.device("cpu")


def test_precisions_by_name(folders):
    assert load_vlm(folders / "llava-next", "cpu", "bf16").model.dtype == torch.bfloat16
    assert load_vlm(folders / "llava-next", "cpu", torch.float16).model.dtype == torch.float16
    assert load_vlm(folders / "llava-next", "cpu", "auto").model.dtype == torch.float32
    assert check_dtype("half") == torch.float16 and check_dtype(None) is None
    for dtype in ("bf17", "int8", torch.int8, "Tensor"):
        with pytest.raises(TokenselError, match=r"dtype is .*: give auto, float32, bfloat16 or float16"):
            load_vlm(folders / "llava-next", "cpu", dtype)


def test_a_package_that_is_missing_is_named(folders):
    from transformers import BitsAndBytesConfig

    with pytest.raises(MissingPackageError, match="needs a package that is not installed"):
        load_vlm(folders / "llava-next", "cpu", attn="flash_attention_2")
    with pytest.raises(MissingPackageError, match="bitsandbytes"):
        load_vlm(folders / "llava-next", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(TokenselError, match="no_such_attention"):
        load_vlm(folders / "llava-next", "cpu", attn="no_such_attention")


def test_without_a_padding_token_the_end_token_pads(folders, tmp_path):
    model, processor = tiny_llava()
    processor.tokenizer.pad_token = None
    model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    vlm, wanted = load_vlm(tmp_path, "cpu"), load_vlm(folders / "llava-next", "cpu")
    assert vlm.processor.tokenizer.pad_token == "</s>"
    images, questions = [noise_image(24, 24), None], ["short?", "somewhat longer?"]
    answers = [
        each.generate(
            reduce_inputs(
                each.model, each.inputs(images, [each.prompt(questions[0]), each.prompt(questions[1], False)])
            ),
            6,
        )
        for each in (vlm, wanted)
    ]
    assert answers[0] == answers[1]


def test_a_broken_chat_template_is_named(folders, tmp_path):
    shutil.copytree(folders / "llava-next", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for message in messages %}")
    with pytest.raises(TokenselError, match="its chat template is broken"):
        load_vlm(tmp_path / "model", "cpu").prompt("what?")
