"""What is measured: a model, its inputs, and the variants that give it fewer tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
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
from tokensel.vlm import Choices, Encoded, Reduced, Vlm, encode, load_vlm
from tokensel.vlm.families import family_of
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


def build_vlm(config: CostConfig) -> Vlm:
    """The model with its own weights, or a model of its shape with random ones, which LLaVAs need alone.

    Raises:
        TokenselError: nothing to load under this name, or a model of no known family.
    """
    device = check_device(config.device)
    if not (config.random_weights or config.model in SHAPES):
        dtype = None if config.dtype == "auto" else config.dtype
        return load_vlm(config.model, device, dtype, config.attn, revision=config.revision)
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
    processor = None if known else _processor(config, shape)
    return Vlm(model.eval(), processor, config.model)


def _processor(config: CostConfig, shape: Any) -> Any:
    """The processor beside a configuration; ``None`` for LLaVA-NeXT and OneVision, whose inputs are drawn."""
    family = family_of(shape, config.model)
    if family.tiled:
        return None
    try:
        return family.processor(config.model, shape, **hub_options(config.model, revision=config.revision))
    except (OSError, ValueError) as error:
        raise TokenselError(
            f"{config.model} holds no processor, which says what an image becomes ({reason(error)}); give a "
            "folder or hub id that does"
        ) from None


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
    family_of(config, name)  # raises
    return config


def build_selector(config: CostConfig, model: PreTrainedModel) -> TokenSelector:
    """The trained selector, or one of the configured depth with random weights."""
    if config.selector is not None:
        return TokenSelector.from_pretrained(config.selector)
    family, shape = family_of(model.config), model.config
    reads_layer = family.reads_layer
    width = (
        feature_width(shape.vision_config, shape.vision_feature_layer)
        if reads_layer
        else family.patch_width(shape)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return TokenSelector(SelectorConfig(width=width, layers=config.selector_layers))


def build_learned(config: CostConfig, model: PreTrainedModel, option: str) -> CoreModel:
    """The trained model that a scorer takes under ``option``; but for the selector, with random weights."""
    if option == "selector":
        return build_selector(config, model)
    scorer: Any = scorer_class(option)
    scorer.check_tower(model.config)
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


def _processed_inputs(vlm: Vlm, size: str, rows: int, text: int, seed: int = 0) -> dict[str, Tensor]:
    """What the model's own processor makes of ``rows`` images of one size, noise, with a question.

    Args:
        vlm: the model and its processor.
        size: size of the images, as HEIGHTxWIDTH in pixels.
        rows: prompts, each with one image.
        text: tokens of each prompt besides the visual ones; more where template and tags of the image are.
        seed: seed of the noise.
    """
    noise = np.random.default_rng(seed).integers(0, 256, (rows, *image_size(size), 3), dtype=np.uint8)
    batch = dict(vlm.inputs([[image] for image in noise], [vlm.prompt("?")] * rows))
    ids, family = batch["input_ids"], family_of(vlm.model.config)
    visual = torch.isin(ids, family.placeholders(vlm.model.config).to(ids.device))
    missing = max(0, text - int((~visual[0]).sum()))
    words = vlm.processor.tokenizer("what is in it", add_special_tokens=False).input_ids
    more = torch.tensor((words * missing)[:missing], dtype=torch.long, device=ids.device).expand(rows, -1)
    for name, value in batch.items():
        if value.shape == ids.shape:  # one value a column: ids, mask and, in some families, types
            fill = {"input_ids": more, "attention_mask": torch.ones_like(more)}
            batch[name] = torch.cat([value, fill.get(name, torch.zeros_like(more)).to(value)], 1)
    return batch


class Processed(EncodedBatch):
    """A batch that is processed already, and not yet encoded."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Tensor]):
        self.model, self.inputs = model, inputs

    def encode(self, with_images: bool) -> Encoded:
        if with_images:
            return encode(self.model, self.inputs)
        text, places = self.inputs["input_ids"], family_of(self.model.config).placeholders(self.model.config)
        text = text[~torch.isin(text, places.to(text.device))].view(len(text), -1)
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
        processor: makes the inputs of a model that is no LLaVA-NeXT or LLaVA-OneVision.
    """

    config: CostConfig
    model: PreTrainedModel
    selector: TokenSelector
    learned: dict[str, CoreModel]
    scorers: dict[str, Scorer]
    processor: Any = None

    @classmethod
    def of(cls, config: CostConfig, model: PreTrainedModel | None = None) -> "MeasuredModel":
        """Load or draw what ``config`` names; a ``model`` in memory is used instead of ``config.model``."""
        processor = None
        if model is None:
            vlm = build_vlm(config)
            model, processor = vlm.model, vlm.processor
        rows = [row for method in config.methods if (row := check_method(method)).scorer is not None]
        selector = build_selector(config, model)
        learned: dict[str, CoreModel] = {"selector": selector}
        for row in rows:
            if row.learned is not None and row.learned not in learned:
                learned[row.learned] = build_learned(config, model, row.learned)
        scorers = {str(row.scorer): make_scorer(str(row.scorer), seed=config.seed, **learned) for row in rows}
        return cls(config, model, selector, learned, scorers, processor)

    def inputs(self, size: str, rows: int) -> dict[str, Tensor]:
        """What ``generate`` of the stock model is given for ``rows`` images of one size."""
        text, seed = self.config.text, self.config.seed
        if family_of(self.model.config).tiled:
            return make_inputs(self.model, size, rows, text, seed)
        return _processed_inputs(Vlm(self.model, self.processor, self.config.model), size, rows, text, seed)

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
