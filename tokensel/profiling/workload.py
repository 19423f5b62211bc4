"""What is measured: a model, its inputs, and the variants that give it fewer tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tokensel.data.features import feature_width
from tokensel.methods import EncodedBatch, check_method
from tokensel.model.base import CoreModel
from tokensel.model.selector import SelectorConfig, TokenSelector
from tokensel.profiling.config import CostConfig, image_size
from tokensel.profiling.shapes import SHAPES
from tokensel.schedules import Schedule, make_schedule, pruned, schedule_options
from tokensel.scorers import LEARNED, Scorer, make_scorer, scorer_class
from tokensel.utils.devices import check_device
from tokensel.utils.errors import TokenselError, reason
from tokensel.utils.loading import hub_options
from tokensel.vlm import Choices, Encoded, Reduced, encode, load_vlm
from tokensel.vlm.families import check_tiled
from tokensel.vlm.layout import read_layout, tile_counts

FULL = "full"  # the stock model on stock inputs: nothing of this library runs


class Variant(NamedTuple):
    """A method and its budget; ``keep`` is 1 where the method has none."""

    method: str
    keep: float


def variants(config: CostConfig) -> list[Variant]:
    """The stock model, then every method under every budget it knows."""
    chosen = [Variant(FULL, 1.0)]
    for method in config.methods:
        keeps = config.keeps if check_method(method).uses_keep else (1.0,)
        chosen += [Variant(method, keep) for keep in keeps]
    return list(dict.fromkeys(chosen))


def schedule_of(variant: Variant, config: CostConfig) -> Schedule | None:
    """The schedule of a variant, or ``None``."""
    row = check_method(variant.method)
    if row.schedule is None:
        return None
    # after a scorer the budget belongs to the scorer, and the schedule keeps its default fraction
    given = {"layer": config.schedule_layer} | ({} if row.chooses else {"keep": variant.keep})
    known = schedule_options(row.schedule)
    return make_schedule(row.schedule, **{name: value for name, value in given.items() if name in known})


def build_model(config: CostConfig) -> PreTrainedModel:
    """The model with its own weights, or a model of its shape with random ones.

    Raises:
        TokenselError: nothing to load under this name, or a model that cuts no image tiles.
    """
    device = check_device(config.device)
    if not (config.random_weights or config.model in SHAPES):
        dtype = None if config.dtype == "auto" else config.dtype
        model = load_vlm(config.model, device, dtype, config.attn, revision=config.revision).model
        check_tiled(model.config, "cost")
        return model
    half = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = half if config.dtype == "auto" else getattr(torch, config.dtype)
    known = config.model in SHAPES
    shape = SHAPES[config.model]() if known else _configuration(config.model, config.revision)
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(config.seed)
        try:
            model = AutoModelForImageTextToText.from_config(
                shape, dtype=dtype, attn_implementation=config.attn
            )
        except (ImportError, ValueError) as error:  # of an attention whose package is missing, or unknown
            raise TokenselError(f"attn is {config.attn!r} ({reason(error)}); give sdpa or eager") from None
    return model.eval()


def _configuration(name: str, revision: str | None) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, **hub_options(name, revision=revision))
    except TokenselError:
        raise
    except (OSError, ValueError) as error:
        raise TokenselError(
            f"{name} holds no configuration ({reason(error)}); give a folder, a hub id, or one of "
            f"{', '.join(SHAPES)}"
        ) from None
    if not hasattr(config, "image_grid_pinpoints"):
        raise TokenselError(f"{name} is a {config.model_type}, which cuts no image tiles: give a LLaVA-NeXT")
    return config


def build_selector(config: CostConfig, model: PreTrainedModel) -> TokenSelector:
    """The trained selector, or one of the configured depth with random weights."""
    if config.selector is not None:
        return TokenSelector.from_pretrained(config.selector)
    width = feature_width(model.config.vision_config, model.config.vision_feature_layer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TokenSelector(SelectorConfig(width=width, layers=config.selector_layers))


def build_learned(config: CostConfig, model: PreTrainedModel, option: str) -> CoreModel:
    """The trained model that a scorer takes under ``option``; but for the selector, with random weights."""
    if option == "selector":
        return build_selector(config, model)
    scorer: Any = scorer_class(option)
    shape: Any = LEARNED[option].config_class
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LEARNED[option](shape(width=scorer.width(model.config)))


def make_inputs(model: PreTrainedModel, size: str, rows: int, text: int, seed: int = 0) -> dict[str, Tensor]:
    """What a processor would make of ``rows`` images of one size: noise for pixels, random text tokens.

    Args:
        model: decides tiles, layout and vocabulary.
        size: size of the images, as HEIGHTxWIDTH in pixels.
        rows: prompts, each with one image.
        text: tokens of each prompt besides the image: one before it, the others after it.
        seed: seed of noise and text.
    """
    generator = torch.Generator().manual_seed(seed)
    config, vision = model.config, model.config.vision_config
    sizes = torch.tensor([image_size(size)] * rows)
    tiles = tile_counts(model, {"image_sizes": sizes})
    side, cells = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    packed = len(read_layout(model.base_model, tiles[:1], cells, sizes[:1]).source)
    words = torch.randint(0, config.text_config.vocab_size - 1, (rows, text), generator=generator)
    words += (words >= config.image_token_id).long()  # any token but the placeholder
    image = torch.full((rows, packed), config.image_token_id)
    ids = torch.cat([words[:, :1], image, words[:, 1:]], dim=1)
    pixels = torch.randn(rows, tiles[0], vision.num_channels, side, side, generator=generator)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "image_sizes": sizes.to(model.device),
    }


class Processed(EncodedBatch):
    """A batch that is processed already, and not yet encoded."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]):
        self.model, self.inputs = model, inputs

    def encode(self, with_images: bool) -> Encoded:
        if with_images:
            return encode(self.model, self.inputs)
        text = self.inputs["input_ids"]
        text = text[text != self.model.config.image_token_id].view(len(text), -1)
        return encode(self.model, {"input_ids": text, "attention_mask": torch.ones_like(text)})


@dataclass
class MeasuredModel:
    """The model under measurement and its scorers.

    Attributes:
        config: what to measure.
        model: the model.
        selector: the selector, trained or random.
        learned: what scorers take that have a trained model, by the name of the option.
        scorers: by name, one for every method that has a scorer.
    """

    config: CostConfig
    model: PreTrainedModel
    selector: TokenSelector
    learned: dict[str, CoreModel]
    scorers: dict[str, Scorer]

    @classmethod
    def of(cls, config: CostConfig, model: PreTrainedModel | None = None) -> "MeasuredModel":
        """Load or draw what ``config`` names; a ``model`` in memory is used instead of ``config.model``."""
        model = build_model(config) if model is None else model
        rows = [row for method in config.methods if (row := check_method(method)).scorer is not None]
        selector = build_selector(config, model)
        learned: dict[str, CoreModel] = {"selector": selector}
        for row in rows:
            if row.learned is not None and row.learned not in learned:
                learned[row.learned] = build_learned(config, model, row.learned)
        scorers = {str(row.scorer): make_scorer(str(row.scorer), seed=config.seed, **learned) for row in rows}
        return cls(config, model, selector, learned, scorers)

    def prepare(
        self, variant: Variant, inputs: dict[str, Tensor], scorer: Scorer | None
    ) -> Mapping[str, Tensor]:
        """From the processor's output to the inputs of ``generate`` under a variant."""
        if variant.method == FULL:
            return inputs
        return check_method(variant.method).run(
            Processed(self.model, inputs), variant.keep, scorer, Choices()
        )

    @contextmanager
    def dropping(self, variant: Variant, prepared: Mapping[str, Tensor]) -> Iterator[None]:
        """Within this context, the language model drops tokens if the variant has a schedule."""
        schedule = schedule_of(variant, self.config)
        if schedule is None or not isinstance(prepared, Reduced):
            yield
        else:
            with pruned(self.model, prepared.prompt, schedule):
                yield
