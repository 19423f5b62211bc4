"""Tasks of lmms-eval with fewer visual tokens: a model for its command line.

lmms-eval is not a dependency. Where both are installed (``pip install tokensel[lmms-eval]``, best in a
separate environment, since it installs some hundred packages), lmms-eval finds the model by itself::

    python -m lmms_eval --model tokensel --tasks docvqa_val \\
        --model_args pretrained=llava-hf/llava-v1.6-mistral-7b-hf,method=selector,selector=FOLDER,keep=0.3
        --batch_size 8
"""

from collections.abc import Mapping
from typing import Any

import torch

from tokensel.benchmarks.questions import stable_keys
from tokensel.benchmarks.shards import local_device
from tokensel.methods import Batch, check_method, prepare
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm import Choices, load_vlm

_Base: Any
try:
    from lmms_eval.api.model import lmms as _Base  # pyright: ignore[reportMissingImports]  # an extra
except ImportError:  # the module can be imported and tested without it
    _Base = object

PLACEHOLDER = "<image>"
UNLIMITED = 1024  # where a task sets no limit, as lmms-eval's own LLaVA does


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` of this package returns to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]  # an extra

    return ModelManifest("tokensel", simple_class_path=f"{__name__}.Tokensel")


class Tokensel(_Base):
    """A vision-language model under one method and budget, as a model of lmms-eval."""

    is_simple = True  # requests consist of a text and a list of images

    def __init__(
        self,
        pretrained: str,
        method: str = "full",
        keep: float = 1.0,
        selector: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        **choices: Any,
    ):
        """
        Args:
            pretrained: folder or hub id of the model.
            method: a row of :func:`tokensel.methods.methods`; no schedule.
            keep: fraction of the visual tokens to keep, in (0, 1].
            selector: folder or hub id of the trained model of a method such as ``selector``.
            seed: of the method ``random``.
            batch_size: questions at a time.
            device: of the model; by default the GPU of this process, if there is one.
            dtype: of the model; by default the checkpoint's own on a GPU.
            choices: see :class:`~tokensel.vlm.choose.Choices`.

        Raises:
            TokenselError: an unknown method or a schedule, an option that the method does not use or that
                is out of range, or a model or selector that cannot be loaded.
        """
        super().__init__()
        row = check_method(method)
        if row.schedule:
            raise TokenselError(
                f"method {method} drops tokens inside the language model: give one that chooses before it"
            )
        self.method, self.keep, self.choices = method, check_keep(float(keep)), Choices.of(choices)
        if selector is not None and row.learned is None:
            raise TokenselError(
                f"method {method} uses no selector: give method=selector, or leave selector out"
            )
        if self.keep < 1 and not row.uses_keep:
            raise TokenselError(f"method {method} keeps no fraction of the tokens: leave keep={keep} out")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise TokenselError(f"batch_size is {batch_size!r}: give a whole number of at least 1")
        self.batch_size = int(batch_size)
        options = {"seed": int(seed)} | ({} if row.learned is None else {row.learned: selector})
        self.scorer = make_scorer(row.scorer, **options) if row.scorer else None
        self.vlm = load_vlm(pretrained, local_device(str(device or "auto")), dtype)

    @torch.inference_mode()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each request: new text alone, however short the prompt has become.

        A context that has a placeholder for each of its images is asked with the images at these places. In
        any other, the images come first.

        Raises:
            TokenselError: a task that samples or searches with beams; answers are greedy here.
        """
        answers = {}
        by_limit: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[1]
            _check_greedy(options)
            by_limit.setdefault(options.get("max_new_tokens", UNLIMITED), []).append(i)
        for limit, members in by_limit.items():
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                asked = [requests[i].args for i in some]
                images = [
                    list(look(self.task_dict[task][split][doc])) or None
                    for _, _, look, doc, task, split in asked
                ]
                keys = stable_keys([f"{task} {split} {doc}" for *_, doc, task, split in asked])
                place = self.vlm.processor.image_token
                turns = [_question(args[0], len(row or ()), place) for args, row in zip(asked, images)]
                questions, marked = zip(*turns)
                batch = Batch(self.vlm, images, questions, keys, marked)
                reduced = prepare(batch, self.method, self.keep, self.choices, self.scorer)
                texts = self.vlm.generate(reduced, limit)
                answers |= {i: _cut(text, requests[i].args[1].get("until")) for i, text in zip(some, texts)}
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not for generated answers."""
        raise TokenselError("tokensel generates text: choose a task that generates, not one of likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not for conversations."""
        raise TokenselError("tokensel answers single questions: choose a task of one round")


def _check_greedy(options: Mapping[str, Any]) -> None:
    """Raise on options of a task that greedy decoding cannot follow.

    ``top_p`` and ``top_k`` alone change nothing: they shape the distribution of samples, and none are drawn.
    """
    sampled = options.get("do_sample") or (options.get("temperature") or 0) > 0
    if sampled or (options.get("num_beams") or 1) > 1:
        given = {key: options[key] for key in ("do_sample", "temperature", "num_beams") if key in options}
        raise TokenselError(f"the task asks for {given}: answers are greedy here, choose another task")


def _cut(text: str, until: str | list[str] | None) -> str:
    """The text before the first of the strings at which a task stops."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text


def _question(context: str, images: int, place: str) -> tuple[str, bool]:
    """The question of a context, with ``place`` for its placeholders, and whether each image has one.

    Placeholders that do not match the images are left out: which of them is whose cannot be known.
    """
    marked = 0 < context.count(PLACEHOLDER) == images
    if marked or PLACEHOLDER not in context:
        return context.replace(PLACEHOLDER, place), marked
    return context.replace(PLACEHOLDER, "").strip(), False
