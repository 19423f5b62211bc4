"""What the explorer of kept tokens shows, as a plain dictionary: pictures, and one step a method and budget."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from tokensel.benchmarks.metrics import METRICS
from tokensel.figures import overlays, style
from tokensel.scorers import Scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Reduced, Vlm, encode, reduce


@dataclass(frozen=True)
class Subject:
    """A question about a picture.

    Attributes:
        name: what the reader chooses it by.
        image: the picture.
        question: as it is put to the model; the chat template is put around it.
        answers: those that count as right; none if nobody knows.
        metric: a key of :data:`tokensel.benchmarks.metrics.METRICS`.
        options: of a multiple-choice question.
    """

    name: str
    image: Image.Image
    question: str
    answers: Sequence[str] = ()
    metric: str = "exact_match"
    options: Sequence[str] = ()

    def score(self, answer: str) -> float | None:
        """From 0 (wrong) to 1 (right); ``None`` where no right answer is known."""
        return METRICS[self.metric](answer, self.answers, self.options) if self.answers else None


class Exploration:
    """Some questions about pictures, encoded once, to be asked under any method and budget.

    A *step* of a subject is ``{"kept", "error", "mean_error", "tokens", "answer", "score"}``. Of the first two there is
    one entry a view, thumbnail first, then the page: in ``kept`` a text with one letter a cell, row by row (``1`` kept,
    ``0`` dropped, ``-`` letterbox, which never becomes a token); in ``error`` as many whole numbers, the distance
    between a token and its reconstruction in percent of the distance of a typical token to the mean token.

    Args:
        vlm: the model to ask.
        subjects: what is asked, all in one batch.
        scorers: the ways to choose, by name.
        judge: the one reconstructor that measures the errors of every method.
        max_new_tokens: where answers stop at the latest.

    Raises:
        TokenselError: no subjects, or a judge that does not fit the model's features.
    """

    def __init__(
        self,
        vlm: Vlm,
        subjects: Sequence[Subject],
        scorers: Mapping[str, Scorer],
        judge: MaskedAutoencoder,
        max_new_tokens: int = 24,
    ):
        if not subjects:
            raise TokenselError("no subjects: give at least one picture with a question")
        self.vlm, self.subjects, self.scorers, self.judge = vlm, list(subjects), dict(scorers), judge
        self.max_new_tokens = max_new_tokens
        prompts = [vlm.prompt(subject.question) for subject in self.subjects]
        self.encoded = encode(vlm.model, vlm.inputs([subject.image for subject in self.subjects], prompts))
        images = vlm.processor.image_processor
        statistics = (images.image_mean, images.image_std)
        self.looks = [overlays.look(self.encoded, n, statistics) for n in range(len(self.subjects))]

    def step(self, method: str, keep: float) -> list[dict[str, Any]]:
        """One step of every subject, with the fraction ``keep`` of its visual tokens.

        Raises:
            TokenselError: an unknown method, ``keep`` outside (0, 1], or a scorer that does not fit.
        """
        if method not in self.scorers:
            raise TokenselError(f"method '{method}' is unknown here: choose one of {', '.join(self.scorers)}")
        reduced = reduce(self.encoded, self.scorers[method], keep)
        errors = self.errors(reduced.kept)
        steps = self._answers(reduced)
        for subject, step in zip(self.looks, steps):
            kept, real, wrong = map(subject.maps, (reduced.kept, self.encoded.layout.valid, errors))
            step["kept"] = [letters(*view) for view in zip(kept, real)]
            step["error"] = [(100 * view).round().int().flatten().tolist() for view in wrong]
            inside = self.encoded.layout.valid[subject.tiles]
            step["mean_error"] = round(float(errors[subject.tiles][inside].mean()), 3)
        return steps

    def pictures(self) -> list[dict[str, Any]]:
        """Every subject without its steps: its views, and the outcome with all tokens and with no image."""
        full = self._answers(reduce(self.encoded))
        prompts = [self.vlm.prompt(subject.question, False) for subject in self.subjects]
        none = self._answers(reduce(encode(self.vlm.model, self.vlm.inputs(None, prompts))))
        return [
            {
                "name": subject.name,
                "question": subject.question,
                "answers": list(subject.answers),
                "views": views(seen),
                "tiles": [seen.rows, seen.columns],
                "full": with_all,
                "none": without,
            }
            for subject, seen, with_all, without in zip(self.subjects, self.looks, full, none)
        ]

    def data(self, keeps: Sequence[float], progress: bool = True) -> dict[str, Any]:
        """Everything the static explorer needs, for every method and each of ``keeps``.

        Args:
            keeps: fractions of the visual tokens kept, in (0, 1].
            progress: show a bar.
        """
        pictures = self.pictures()
        for picture in pictures:
            picture["steps"] = {method: [] for method in self.scorers}
        todo = [(method, keep) for method in self.scorers for keep in keeps]
        for method, keep in tqdm(todo, desc="explorer", unit="step", disable=not progress):
            for picture, step in zip(pictures, self.step(method, keep)):
                picture["steps"][method].append(step)
        return {
            "kind": "tokens",
            "model": self.vlm.name,
            "keeps": list(keeps),
            "methods": {method: style.label(method) for method in self.scorers},
            "pictures": pictures,
        }

    @torch.no_grad()
    def errors(self, kept: Bool[Tensor, "tiles tokens"]) -> Float[Tensor, "tiles tokens"]:
        """How far each token is from its reconstruction; 1 = as far as a typical token from the mean token."""
        tokens = self.encoded.features.tokens.float()
        typical = self.judge.reconstructor.trunk.spread.norm()
        return (self.judge(tokens, kept) - tokens).norm(dim=-1) / typical

    def _answers(self, reduced: Reduced) -> list[dict[str, Any]]:
        answers = self.vlm.generate(reduced, self.max_new_tokens)
        return [
            {"tokens": int(n), "answer": answer, "score": subject.score(answer)}
            for subject, answer, n in zip(self.subjects, answers, reduced.n_visual)
        ]


def views(seen: overlays.Look) -> list[dict[str, Any]]:
    """What the model is shown of a picture, and how many tokens lie along its sides: the thumbnail, then the page."""
    rows, columns = seen.rows * seen.cells, seen.columns * seen.cells
    return [
        {"name": "thumbnail", "image": _uri(seen.thumbnail), "rows": seen.cells, "columns": seen.cells},
        {"name": "full size", "image": _uri(seen.page), "rows": rows, "columns": columns},
    ]


def letters(kept: Bool[Tensor, "rows columns"], real: Bool[Tensor, "rows columns"]) -> str:
    """One letter a cell, row by row: ``1`` kept, ``0`` dropped, ``-`` no token."""
    codes = (kept.long() + 1) * real.long()
    return "".join("-01"[code] for code in codes.flatten().tolist())


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
