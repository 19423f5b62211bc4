"""A vision-language model with its processor: from questions and images to inputs, and on to answers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL.Image import Image
from transformers import BatchFeature, PreTrainedModel

from tokensel.data.images import as_image
from tokensel.schedules.schedule import Schedule
from tokensel.scorers import Scorer
from tokensel.utils.errors import TokenselError, check_type, reason
from tokensel.vlm.families import family_of
from tokensel.vlm.generate import GenerationOutput, generate
from tokensel.vlm.reduce import Reduced, reduce_inputs

__all__ = ["Vlm", "images_of_row"]


def images_of_row(row: Any) -> list[Any]:
    """The images of one question as a list: none for ``None``, one, or those of a list or tuple."""
    if row is None:
        return []
    return list(row) if isinstance(row, (list, tuple)) else [row]


@dataclass
class Vlm:
    """A vision-language model of transformers and what turns images and questions into its inputs.

    Attributes:
        model, processor, name: the model, its processor, and the folder or hub id they came from.
        native: how the model would compress on its own, now switched off (see :mod:`tokensel.vlm.native`); or
            ``None``.

    >>> vlm = load_vlm("llava-hf/llava-v1.6-mistral-7b-hf")
    >>> selector = make_scorer("selector", selector="folder or hub id")
    >>> vlm.answer(image, "What is the total?", scorer=selector, keep=0.3)
    """

    model: PreTrainedModel
    processor: Any  # the processors of transformers share no type with a tokenizer
    name: str
    native: str | None = None

    def prompt(self, question: str, image: bool | int = True, *, marked: bool = False) -> str:
        """The user's turn in the model's own chat template, with ``image`` images before the question.

        Args:
            question: the question.
            image: how many images it has.
            marked: the question itself has an image placeholder where each of its images belongs, and none
                is put before it.

        Raises:
            TokenselError: no chat template, a broken one, a question that contains an image placeholder and
                is not ``marked``, or a marked one with another number of placeholders than images.
        """
        if not (self.processor.chat_template or self.processor.tokenizer.chat_template):
            raise TokenselError(
                f"{self.name} has no chat template: write the prompts yourself and pass them to inputs()"
            )
        check_type("the question", question, str, "text")
        if marked and (places := question.count(self.processor.image_token)) != int(image):
            raise TokenselError(
                f"the question {question!r} marks the places of {places} images and has {int(image)}: give "
                "one for each"
            )
        for article, kind in (("an", "image"), ("a", "video")):
            token = getattr(self.processor, f"{kind}_token", None)
            if token is not None and token in question and not (marked and kind == "image"):
                raise TokenselError(
                    f"the question {question!r} contains {token}, which stands for {article} {kind}: write "
                    "it in another way, and pass images separately"
                )
        if marked:
            token, mark = self.processor.image_token, family_of(self.model.config, self.name).mark
            question = question.replace(mark(token), token).replace(token, mark(token))
        before = 0 if marked else int(image)
        content = [{"type": "image"}] * before + [{"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        try:
            return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as error:
            raise TokenselError(
                f"{self.name}: its chat template is broken ({reason(error)}); repair chat_template.jinja, or "
                "pass prompts to inputs()"
            ) from None

    def inputs(self, images: Sequence[Any] | None, prompts: Sequence[str]) -> BatchFeature:
        """Process a batch, padded on the left, on the model's device.

        Args:
            images: for each prompt an image, a list of several, or ``None``; ``None`` for a batch without
                any. An image is whatever :func:`~tokensel.data.images.as_image` takes: a PIL image, path,
                bytes or array.
            prompts: as :meth:`prompt` makes them, with a placeholder for every image.

        Raises:
            TokenselError: no prompts, a row whose images and placeholders differ in number, a row without an
                image where the model needs one, an image that cannot be read, or prompts of several lengths
                where the tokenizer has no token to pad with.
        """
        check_type("prompts", prompts, (list, tuple), "a list of texts")
        for prompt in prompts:
            check_type("a prompt", prompt, str, "text")
        if images is not None:
            # any sequence, such as a column of a dataset, but a text would be read letter by letter
            several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
            images = list(images) if several else images
            check_type("images", images, list, "a list with an entry for each prompt")
        rows = [[]] * len(prompts) if images is None else [images_of_row(row) for row in images]
        if not len(prompts):
            raise TokenselError("no prompts: give at least one")
        if len(rows) != len(prompts):
            raise TokenselError(
                f"{len(rows)} rows of images for {len(prompts)} prompts: give as many as prompts"
            )
        token, video = self.processor.image_token, getattr(self.processor, "video_token", None)
        for number, (row, prompt) in enumerate(zip(rows, prompts)):
            # row by row: a sum that fits would give one row's image to another
            if (places := prompt.count(token)) != len(row):
                raise TokenselError(
                    f"prompt {number} has {places} image placeholders ({token}) and {len(row)} images: give "
                    "one for each"
                )
            if video is not None and video in prompt:
                raise TokenselError(
                    f"prompt {number} has a place for a video ({video}): give frames as images"
                )
        # nested by row: LLaVA-OneVision leaves the images of a row with several of them uncut
        family = family_of(self.model.config, self.name)
        if family.needs_image and not all(rows):
            raise TokenselError(f"{self.name} is a {family.name}: give at least one image with each prompt")
        empty_rows = family.empty_rows and any(rows)
        nested = [[as_image(image) for image in row] for row in rows if row or empty_rows]
        tokenizer = self.processor.tokenizer
        if tokenizer.pad_token is None and len(prompts) > 1:
            raise TokenselError(
                f"{self.name}: its tokenizer has no token to pad with; set one, or ask one at a time"
            )
        # templates may begin with the token that the tokenizer would put there again
        begun = tokenizer.bos_token is not None and all(
            prompt.startswith(tokenizer.bos_token) for prompt in prompts
        )
        batch = self.processor(
            images=nested or None,
            text=list(prompts),
            padding=len(prompts) > 1,
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
        image: Image | str | os.PathLike | Any | None,
        question: str,
        scorer: Scorer | None = None,
        keep: float | None = 1.0,
        max_new_tokens: int = 64,
        **choices: Any,
    ) -> str:
        """Answer one question about one image, with only the visual tokens that ``scorer`` ranks highest.

        Args:
            image: the image (a PIL image, path, bytes or array), a list of several, or ``None`` for the
                question alone.
            question: the question; the chat template is put around it.
            scorer: ranks the tokens, see :func:`~tokensel.scorers.make_scorer`; ``None`` keeps all.
            keep: fraction of the visual tokens to keep, or ``None`` for as many as the selector would keep.
            max_new_tokens: where to stop at the latest.
            choices: see :class:`~tokensel.vlm.choose.Choices`.

        Raises:
            TokenselError: an image that cannot be read, a question with an image placeholder, an unknown
                choice.
        """
        inputs = self.inputs([image], [self.prompt(question, len(images_of_row(image)))])
        return self.generate(reduce_inputs(self.model, inputs, scorer, keep, **choices), max_new_tokens)[0]
