"""Every method that is compared, with one signature.

Full image, no image, the scorers, a smaller image, the model's own compression, and the schedules.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tokensel.schedules import SCHEDULES, schedule_options
from tokensel.scorers import LEARNED, SCORERS, Scorer, make_scorer, scorer_class, scorer_options
from tokensel.scorers.lowest import LOWEST, Lowest
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.asked import asked
from tokensel.vlm.choose import Choices
from tokensel.vlm.downsample import downsample, pool
from tokensel.vlm.encode import Encoded, encode
from tokensel.vlm.model import Vlm, images_of_row
from tokensel.vlm.native import native
from tokensel.vlm.reduce import Reduced, reduce

__all__ = ["Batch", "EncodedBatch", "Method", "check_method", "methods", "prepare"]


class EncodedBatch(ABC):
    """Questions about images as the methods see them: encoded at most once, whatever is tried on them.

    Attributes:
        native: how the model would compress on its own (:mod:`tokensel.vlm.native`), or ``None``.
    """

    native: str | None = None

    @cached_property
    def seeing(self) -> Encoded:
        """The questions with their images."""
        return self.encode(with_images=True)

    @cached_property
    def blind(self) -> Encoded:
        """The questions alone."""
        return self.encode(with_images=False)

    @abstractmethod
    def encode(self, with_images: bool) -> Encoded:
        """Process the questions, with their images or without."""


class Batch(EncodedBatch):
    """Questions about images, processed and encoded when a method first needs them."""

    def __init__(
        self,
        vlm: Vlm,
        images: Sequence[Any],
        questions: Sequence[str],
        keys: Int[Tensor, "rows"] | Sequence[int] | None = None,
        marked: Sequence[bool] | None = None,
    ):
        """
        Args:
            vlm: the model to ask.
            images: for each question an image, a list of several, or ``None``; see :meth:`Vlm.inputs`.
            questions: the users' turns; the chat template is put around them here.
            keys: a stable number for each row, the seed of its random selection; made from the pixels by
                default.
            marked: for each question whether it marks the places of its images itself, see
                :meth:`Vlm.prompt`; none does by default.

        Raises:
            TokenselError: images and questions differ in number.
        """
        if len(images) != len(questions):
            raise TokenselError(
                f"{len(images)} rows of images for {len(questions)} questions: give as many as questions"
            )
        self.vlm, self.images, self.questions, self.keys = vlm, list(images), list(questions), keys
        self.marked = [False] * len(questions) if marked is None else list(marked)
        self.native = vlm.native

    def encode(self, with_images: bool) -> Encoded:
        if not with_images:
            place = self.vlm.processor.image_token
            blind = [q.replace(place, "") if own else q for q, own in zip(self.questions, self.marked)]
            prompts = [self.vlm.prompt(question, False) for question in blind]
            return encode(self.vlm.model, self.vlm.inputs(None, prompts))
        prompts = [
            self.vlm.prompt(question, len(images_of_row(row)), marked=own)
            for question, row, own in zip(self.questions, self.images, self.marked)
        ]
        return encode(self.vlm.model, self.vlm.inputs(self.images, prompts), self.keys)


@dataclass(frozen=True)
class Method:
    """A row of :func:`methods`, perhaps with a schedule.

    Attributes:
        run: from batch, keep, scorer and choices to inputs for ``generate``.
        chooses: whether tokens are chosen before the language model, so that :class:`Choices` matter.
        uses_keep: False where every budget gives the same result, so that one evaluation serves them all.
        scorer: the name of the scorer it ranks tokens with, if any.
        schedule: the name of the schedule that drops tokens inside the language model, if any.
        uses_question: whether a function without a scorer chooses by the question.
        uses_native: whether it is the model's own compression, which not every model has.
    """

    run: Callable[[EncodedBatch, float | None, Scorer | None, Choices], Reduced]
    chooses: bool = True
    uses_keep: bool = True
    scorer: str | None = None
    schedule: str | None = None
    uses_native: bool = False
    uses_question: bool = False

    def classes(self) -> list[Any]:
        """The classes of its scorer and its schedule, as far as it has them."""
        scorer: list[Any] = [] if self.scorer is None else [scorer_class(self.scorer)]
        if self.scorer is not None and self.scorer.startswith(LOWEST):
            scorer.append(Lowest)
        return scorer if self.schedule is None else [*scorer, SCHEDULES[self.schedule]]

    @property
    def uses_seed(self) -> bool:
        """Whether another seed gives another result."""
        scorer = self.scorer is not None and "seed" in scorer_options(self.scorer)
        return scorer or (self.schedule is not None and "seed" in schedule_options(self.schedule))

    @property
    def learned(self) -> str | None:
        """The option of its scorer that is a trained model, a key of ``LEARNED``, if it has one."""
        options = () if self.scorer is None else scorer_options(self.scorer)
        return next((option for option in options if option in LEARNED), None)

    @property
    def uses_predictor(self) -> bool:
        """Whether its schedule has a learned part, a rate predictor."""
        return self.schedule is not None and "predictor" in schedule_options(self.schedule)

    @property
    def needs_cls_attention(self) -> bool:
        """Whether its scorer reads the attention of the encoder's CLS token."""
        return self.scorer is not None and getattr(scorer_class(self.scorer), "needs_cls_attention", False)


def _full(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """Everything the model would see without us; the choices apply to what is dropped, and nothing is."""
    return reduce(batch.seeing)


def _none(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """The question without the image (the red dashed line of the paper's Figs. 4 to 7)."""
    return replace(reduce(batch.blind), n_visual_full=batch.seeing.n_visual)


def _scored(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """The tokens that a scorer ranks highest."""
    return reduce(batch.seeing, scorer, keep, **vars(choices))


def _downsample(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """As many tokens from a smaller image."""
    if keep is None:
        raise TokenselError("method 'downsample' has no threshold of its own: give keep, such as 0.3")
    return downsample(batch.seeing, keep, **vars(choices))


def _pool(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """As many tokens, each the average of several."""
    if keep is None:
        raise TokenselError("method 'pool' has no threshold of its own: give keep, such as 0.25")
    return pool(batch.seeing, keep, **vars(choices))


def _asked(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """The tokens that the question attends to when the language model reads the whole prompt once before."""
    if keep is None:
        raise TokenselError("method 'asked' has no threshold of its own: give keep, such as 0.2")
    return asked(batch.seeing, keep, **vars(choices))


def _native(batch: EncodedBatch, keep: float | None, scorer: Scorer | None, choices: Choices) -> Reduced:
    """All tokens, compressed as the model does it on its own."""
    return native(batch.seeing, batch.native)


def methods() -> dict[str, Method]:
    """All methods without a schedule: a row for every scorer that is registered, and six that need none.

    Every scorer is a method upside down, too: ``lowest-norm`` keeps the tokens of the smallest norm.
    """
    return {
        "full": Method(_full, chooses=False, uses_keep=False),
        "none": Method(_none, chooses=False, uses_keep=False),
        **{name: Method(_scored, scorer=name) for name in SCORERS},
        "downsample": Method(_downsample),
        "pool": Method(_pool),
        "asked": Method(_asked, uses_question=True),
        "native": Method(_native, chooses=False, uses_keep=False, uses_native=True),
    }


def check_method(name: str) -> Method:
    """The method called ``name``: one of :func:`methods`, a schedule, or both, as ``selector+fastv``.

    Raises:
        TokenselError: there is none; the line lists those there are.
    """
    rows = methods()
    if LOWEST in name and (plain := name.removeprefix(LOWEST).partition("+")[0]) in SCORERS:
        rows[LOWEST + plain] = Method(_scored, scorer=LOWEST + plain)
    if name in rows:
        return rows[name]
    if name in SCHEDULES:
        return replace(rows["full"], uses_keep=SCHEDULES[name].uses_keep, schedule=name)
    before, _, inside = name.rpartition("+")
    if inside in SCHEDULES and before in rows and rows[before].chooses:
        return replace(rows[before], schedule=inside)
    raise TokenselError(
        f"method '{name}' is unknown: choose one of {', '.join([*rows, *SCHEDULES])}, or one that chooses "
        "tokens and one that drops them with a plus between, such as selector+fastv"
    )


def prepare(
    batch: EncodedBatch,
    method: str,
    keep: float | None = 1.0,
    choices: Choices | dict[str, Any] | None = None,
    scorer: Scorer | None = None,
) -> Reduced:
    """Inputs for ``vlm.generate`` for a batch of questions, under any method.

    >>> batch = Batch(vlm, images, questions)
    >>> for keep in (0.1, 0.5):
    ...     answers = vlm.generate(prepare(batch, "norm", keep))

    Args:
        batch: the questions and their images; it remembers their features, so that further methods and
            budgets on the same batch do not run the vision tower again.
        method: see :func:`check_method`; what a schedule does later is for ``vlm.generate(schedule=)``.
        keep: fraction of the visual tokens to keep, in (0, 1]; ``None`` lets an adaptive scorer decide.
            Checked for "full" and "none" too, which do not depend on it.
        choices: see :class:`~tokensel.vlm.choose.Choices`.
        scorer: the scorer of the method; made here where it needs no selector, with seed 0.

    Returns:
        Inputs for generation; ``n_visual`` is the number of visual tokens left in each row.

    Raises:
        TokenselError: an unknown method or choice, ``keep`` outside (0, 1], a scorer that is missing or does
            not fit.
    """
    row = check_method(method)
    options = Choices.of(choices)
    if keep is not None:
        check_keep(keep)
    if row.scorer is not None and scorer is None:
        scorer = make_scorer(row.scorer)
    return row.run(batch, keep, scorer, options)
