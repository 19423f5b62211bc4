"""Every way to answer that is compared: full image, no image, the scorers, a smaller image, the schedules. One signature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Int
from PIL.Image import Image
from torch import Tensor

from tokensel.schedules import SCHEDULES
from tokensel.scorers import SCORERS, Scorer, make_scorer
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.choose import Choices
from tokensel.vlm.downsample import downsample
from tokensel.vlm.encode import Encoded, encode
from tokensel.vlm.load import Vlm
from tokensel.vlm.native import native
from tokensel.vlm.reduce import Reduced, reduce


class Batch:
    """Questions about pictures, encoded at most once however many methods and budgets are tried on them."""

    def __init__(
        self,
        vlm: Vlm,
        images: Sequence[Image | Sequence[Image] | None],
        questions: Sequence[str],
        keys: Int[Tensor, "rows"] | Sequence[int] | None = None,
    ):
        """
        Args:
            vlm: the model to ask.
            images: for each question a picture, several, or ``None``.
            questions: the users' turns; the chat template is put around them here.
            keys: a stable number for each row, by which random selection draws; from the pixels by default.
        """
        if len(images) != len(questions):
            raise TokenselError(
                f"{len(images)} rows of images for {len(questions)} questions: give as many as questions"
            )
        self.vlm, self.images, self.questions, self.keys = vlm, list(images), list(questions), keys

    @cached_property
    def seeing(self) -> Encoded:
        """The questions with their pictures, after the vision tower."""
        numbers = [0 if i is None else 1 if isinstance(i, Image) else len(i) for i in self.images]
        prompts = [self.vlm.prompt(q, n) for q, n in zip(self.questions, numbers, strict=True)]
        return encode(self.vlm.model, self.vlm.inputs(self.images, prompts), self.keys)

    @cached_property
    def blind(self) -> Encoded:
        """The questions alone."""
        return encode(
            self.vlm.model, self.vlm.inputs(None, [self.vlm.prompt(q, False) for q in self.questions])
        )


@dataclass(frozen=True)
class Method:
    """A row of :data:`METHODS`, perhaps with a schedule.

    Attributes:
        run: from batch, keep, scorer and choices to inputs for ``generate``.
        chooses: whether tokens are chosen before the language model, so that the choices of the seam matter.
        uses_keep: False where every budget gives the same result, so that one evaluation serves them all.
        uses_seed: whether another seed gives another result.
        scorer: the name of the scorer it ranks tokens with, if any.
        schedule: the name of the schedule that drops tokens inside the language model, if any.
    """

    run: Callable[[Batch, float | None, Scorer | None, Choices], Reduced]
    chooses: bool = True
    uses_keep: bool = True
    uses_seed: bool = False
    scorer: str | None = None
    schedule: str | None = None


def _full(batch: Batch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """Everything the model would see without us; the choices apply to what is dropped, and nothing is."""
    return reduce(batch.seeing)


def _none(batch: Batch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """The question without the picture (the red dashed line of the paper's Figs. 4 to 7)."""
    blind = reduce(batch.blind)
    blind.n_visual_full = batch.seeing.n_visual
    return blind


def _scored(batch: Batch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """The tokens a scorer puts first."""
    return reduce(batch.seeing, scorer, keep, **vars(choices))


def _downsample(batch: Batch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """As many tokens from a smaller image."""
    return downsample(batch.seeing, keep, **vars(choices))


def _native(batch: Batch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """All tokens, compressed as the model does it on its own."""
    return native(batch.seeing, batch.vlm.native)


METHODS: dict[str, Method] = {
    "full": Method(_full, chooses=False, uses_keep=False),
    "none": Method(_none, chooses=False, uses_keep=False),
    **{name: Method(_scored, uses_seed=name == "random", scorer=name) for name in SCORERS},
    "downsample": Method(_downsample),
    "native": Method(_native, chooses=False, uses_keep=False),
}


def check_method(name: str) -> Method:
    """The method called ``name``: a row of :data:`METHODS`, a schedule, or one after the other, as ``selector+fastv``.

    Raises:
        TokenselError: there is none; the line lists those there are.
    """
    if name in METHODS:
        return METHODS[name]
    if name in SCHEDULES:
        return replace(METHODS["full"], uses_keep=SCHEDULES[name].uses_keep, schedule=name)
    before, _, inside = name.rpartition("+")
    if inside in SCHEDULES and before in METHODS and METHODS[before].chooses:
        return replace(METHODS[before], schedule=inside)
    raise TokenselError(
        f"method '{name}' is unknown: choose one of {', '.join([*METHODS, *SCHEDULES])}, or one that chooses tokens "
        "and one that drops them with a plus between, such as selector+fastv"
    )


def prepare(
    vlm: Vlm,
    images: Sequence[Image | Sequence[Image] | None],
    questions: Sequence[str],
    method: str,
    keep: float | None = 1.0,
    choices: Choices | dict[str, Any] | None = None,
    keys: Int[Tensor, "rows"] | Sequence[int] | None = None,
    scorer: Scorer | None = None,
    batch: Batch | None = None,
) -> Reduced:
    """Inputs for ``vlm.generate`` for a batch of questions, under any method.

    >>> batch = Batch(vlm, images, questions, keys)
    >>> for keep in (0.1, 0.5):
    ...     answers = vlm.generate(prepare(vlm, images, questions, "norm", keep, batch=batch))

    Args:
        vlm: the model to ask.
        images: for each question a picture, several, or ``None``.
        questions: the users' turns; the chat template is put around them here.
        method: see :func:`check_method`; what a schedule does later is for ``vlm.generate(schedule=)``.
        keep: fraction of the visual tokens to keep, in (0, 1]; ``None`` lets an adaptive scorer decide.
            Checked for "full" and "none" too, which do not depend on it.
        choices: see :class:`~tokensel.vlm.choose.Choices`.
        keys: a stable number for each row, by which random selection draws; from the pixels by default.
        scorer: the scorer of the method; made here where it needs neither a selector nor a seed.
        batch: the same images, questions and keys, encoded already or to be encoded for the next call too.

    Returns:
        Inputs for generation; ``n_visual`` says how many visual tokens each row has left.

    Raises:
        TokenselError: an unknown method or choice, ``keep`` outside (0, 1], a scorer that is missing or does
            not fit.
    """
    row = check_method(method)
    options = Choices.of(choices)
    if keep is not None:
        check_keep(keep)
    elif row.chooses and row.scorer is None:
        raise TokenselError(f"method '{method}' has no threshold of its own: give keep, such as 0.3")
    if row.scorer is not None and scorer is None:
        scorer = make_scorer(row.scorer)
    return row.run(batch or Batch(vlm, images, questions, keys), keep, scorer, options)
