"""A LLaVA with its processor: load it, ask it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedModel,
    ProcessorMixin,
)

from tokensel.schedules.schedule import Schedule
from tokensel.scorers import Scorer
from tokensel.utils.errors import TokenselError, reason
from tokensel.utils.loading import hub_options
from tokensel.vlm.generate import GenerationOutput, generate
from tokensel.vlm.native import LlavaOnevisionProcessor, switch_off
from tokensel.vlm.reduce import Reduced, reduce_inputs


@dataclass
class Vlm:
    """A vision-language model of transformers and what turns pictures and questions into its inputs.

    Attributes:
        model, processor, name: the model, its processor, and the folder or hub id they came from.
        native: how the model would compress on its own, now switched off (see :mod:`tokensel.vlm.native`); or ``None``.

    >>> vlm = load_vlm("llava-hf/llava-v1.6-mistral-7b-hf")
    >>> selector = make_scorer("selector", selector="folder or hub id")
    >>> vlm.answer(image, "What is the total?", scorer=selector, keep=0.3)
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    name: str
    native: str | None = None

    def prompt(self, question: str, image: bool | int = True) -> str:
        """The user's turn in the model's own chat template, with ``image`` pictures before the question.

        Raises:
            TokenselError: the processor has no chat template.
        """
        if not (self.processor.chat_template or self.processor.tokenizer.chat_template):
            raise TokenselError(
                f"{self.name} has no chat template: write the prompts yourself and pass them to inputs()"
            )
        content = [{"type": "image"}] * int(image) + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def inputs(
        self, images: Sequence[Image | Sequence[Image] | None] | None, prompts: Sequence[str]
    ) -> BatchFeature:
        """Process a batch, padded on the left, on the model's device.

        Args:
            images: for each prompt a picture, several, or ``None``; ``None`` for a batch without any.
            prompts: as :meth:`prompt` makes them, with a placeholder for every picture.

        Raises:
            TokenselError: images and prompts differ in number.
        """
        rows = [None] * len(prompts) if images is None else list(images)
        if len(rows) != len(prompts):
            raise TokenselError(
                f"{len(rows)} rows of images for {len(prompts)} prompts: give as many as prompts"
            )
        several = [[] if row is None else [row] if isinstance(row, Image) else row for row in rows]
        # by row: LLaVA-OneVision leaves the images of a row with several of them uncut
        nested = [[image.convert("RGB") for image in row] for row in several if len(row)]
        tokenizer = self.processor.tokenizer
        # templates may begin with the token that the tokenizer would put there again
        begun = tokenizer.bos_token is not None and all(
            prompt.startswith(tokenizer.bos_token) for prompt in prompts
        )
        batch = self.processor(
            images=nested or None,
            text=list(prompts),
            padding=True,
            padding_side="left",
            add_special_tokens=not begun,
            return_tensors="pt",
        )
        return batch.to(self.model.device, self.model.dtype)

    def generate_output(
        self, reduced: Reduced, max_new_tokens: int = 64, schedule: Schedule | None = None, **options: Any
    ) -> GenerationOutput:
        """Texts, tokens, lengths and what the schedule did; see :func:`tokensel.vlm.generate.generate`."""
        return generate(self.model, self.processor.tokenizer, reduced, max_new_tokens, schedule, **options)

    def generate(
        self, reduced: Reduced, max_new_tokens: int = 64, schedule: Schedule | None = None, **options: Any
    ) -> list[str]:
        """The texts of :meth:`generate_output`: new text alone, without the prompt."""
        return self.generate_output(reduced, max_new_tokens, schedule, **options).texts

    def answer(
        self,
        image: Image | None,
        question: str,
        scorer: Scorer | None = None,
        keep: float | None = 1.0,
        max_new_tokens: int = 64,
        **choices: Any,
    ) -> str:
        """Answer one question about one picture, with only the visual tokens that ``scorer`` puts first.

        Args:
            image: the picture, or ``None`` to ask blindly.
            question: the question; the chat template is put around it.
            scorer: ranks the tokens, see :func:`~tokensel.scorers.make_scorer`; ``None`` keeps all.
            keep: fraction of the visual tokens to keep, or ``None`` for as many as the selector would keep.
            max_new_tokens: where to stop at the latest.
            choices: see :class:`~tokensel.vlm.choose.Choices`.
        """
        inputs = self.inputs([image], [self.prompt(question, image is not None)])
        return self.generate(reduce_inputs(self.model, inputs, scorer, keep, **choices), max_new_tokens)[0]


def load_vlm(
    name: str | os.PathLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    attn: str | None = None,
) -> Vlm:
    """Load a LLaVA-NeXT or LLaVA-OneVision and its processor from a local folder or the Hugging Face hub.

    OneVision's interpolation of visual tokens is switched off (Sec. 5.2 of the paper), see :mod:`tokensel.vlm.native`.

    Args:
        name: folder or hub id, such as ``llava-hf/llava-v1.6-mistral-7b-hf``.
        device: a GPU if there is one, else the CPU.
        dtype: by default that of the checkpoint on a GPU and float32 on a CPU.
        attn: attention implementation of transformers, such as "sdpa" or "eager".

    Raises:
        TokenselError: nothing there under this name (or the hub is out of reach), weights cut short or
            missing, or a model that packs no image tiles.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    options = hub_options(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if not hasattr(config, "image_grid_pinpoints"):
            raise TokenselError(
                f"{name} is a {config.model_type}, which cuts no image tiles: give a LLaVA-NeXT "
                "or LLaVA-OneVision"
            )
        kind = LlavaOnevisionProcessor if config.model_type == "llava_onevision" else AutoProcessor
        processor = kind.from_pretrained(name, **options)
        model, report = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attn, output_loading_info=True, **options
        )
    except TokenselError:
        raise
    except (SafetensorError, EOFError) as error:
        raise TokenselError(
            f"{name}: its weights are cut short or damaged ({error}); fetch or save it again"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise TokenselError(
            f"{name} holds no LLaVA with its processor ({reason(error)}); give a folder or hub id that does"
        ) from None
    if report["missing_keys"]:
        raise TokenselError(
            f"{name}: lacks the weights {sorted(report['missing_keys'])[:3]}; fetch or save it again"
        )
    return Vlm(model.to(device).eval(), processor, str(name), switch_off(model, processor))
