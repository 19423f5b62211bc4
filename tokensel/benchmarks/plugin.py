"""Tasks of lmms-eval with fewer visual tokens: a model for its command line.

lmms-eval is not a dependency. Where both are installed (``pip install tokensel[lmms-eval]``, best in a
separate environment, since it installs some hundred packages), lmms-eval finds the model by itself::

    python -m lmms_eval --model tokensel --tasks docvqa_val \\
        --model_args pretrained=llava-hf/llava-v1.6-mistral-7b-hf,method=selector,selector=FOLDER,keep=0.3
        --batch_size 8
"""

from typing import Any

import torch

from tokensel.benchmarks.questions import stable_keys
from tokensel.methods import Batch, check_method, prepare
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError
from tokensel.vlm import load_vlm

_Base: Any
try:
    from lmms_eval.api.model import lmms as _Base  # pyright: ignore[reportMissingImports]  # an extra
except ImportError:  # the module can be imported and tested without it
    _Base = object

UNLIMITED = 1024  # where a task sets no limit, as lmms-eval's own LLaVA does


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` of this package returns to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]  # an extra

    return ModelManifest("tokensel", simple_class_path=f"{__name__}.Tokensel")


class Tokensel(_Base):
    """A LLaVA under one method and budget, as a model of lmms-eval."""

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
        **choices: str,
    ):
        """
        Args:
            pretrained: folder or hub id of the model.
            method: a row of :func:`tokensel.methods.methods`; no schedule.
            keep: fraction of the visual tokens to keep, in (0, 1].
            selector: folder or hub id of the selector, for the method ``selector``.
            seed: of the method ``random``.
            batch_size: questions at a time.
            device: of the model; by default a GPU if there is one.
            dtype: of the model; by default the checkpoint's own on a GPU.
            choices: see :class:`~tokensel.vlm.choose.Choices`.

        Raises:
            TokenselError: an unknown method or a schedule, or a model or selector that cannot be loaded.
        """
        super().__init__()
        row = check_method(method)
        if row.schedule:
            raise TokenselError(
                f"method {method} drops tokens inside the language model: give one that chooses before it"
            )
        self.scorer = make_scorer(row.scorer, seed=int(seed), selector=selector) if row.scorer else None
        self.vlm = load_vlm(pretrained, device, dtype)
        self.method, self.keep, self.choices = method, float(keep), choices
        self.batch_size = int(batch_size)

    @torch.inference_mode()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each request: new text alone, however short the prompt has become."""
        answers = {}
        by_limit: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_limit.setdefault(request.args[1].get("max_new_tokens", UNLIMITED), []).append(i)
        for limit, members in by_limit.items():
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                asked = [requests[i].args for i in some]
                images = [
                    list(look(self.task_dict[task][split][doc])) or None
                    for _, _, look, doc, task, split in asked
                ]
                keys = stable_keys([f"{task} {split} {doc}" for *_, doc, task, split in asked])
                batch = Batch(self.vlm, images, [question for question, *_ in asked], keys)
                reduced = prepare(batch, self.method, self.keep, self.choices, self.scorer)
                answers |= dict(zip(some, self.vlm.generate(reduced, limit)))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Not for generated answers."""
        raise TokenselError("tokensel generates text: choose a task that generates, not one of likelihoods")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Not for conversations."""
        raise TokenselError("tokensel answers single questions: choose a task of one round")
