"""Steps for the explorer of kept tokens: a plain dictionary for each image, method and budget."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from tokensel.training.metrics import Metric, MetricSource, make_metric
from tokensel.utils.errors import TokenselError
from tokensel.vlm import Reduced, Vlm, encode, reduce


@dataclass(frozen=True)
class Example:
    """An image with a question.

    Attributes:
        name: how the reader picks it.
        image: the image.
        question: the text of the question; the chat template is put around it.
        answers: those that count as right; empty if unknown.
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
    """Examples that are encoded once and then asked under any method and budget.

    A *step* of an example is ``{"kept", "error", "mean_error", "tokens", "answer", "score"}``. The first two
    have one entry for each view, the thumbnail first, then the full image. In ``kept`` it is a text with one
    letter for each cell, row by row (``1`` kept, ``0`` dropped, ``-`` letterbox, which never becomes a
    token). In ``error`` it is as many whole numbers: the distance between a token and its reconstruction, in
    percent of the distance between a typical token and the mean token; both distances are measured where the
    judge was trained, behind the model's projector for example.

    Args:
        vlm: the model to ask.
        examples: what is asked, all in one batch.
        scorers: the scorers to choose from, by name.
        judge: the reconstructor that measures the errors of every method; on any device.
        max_new_tokens: the longest answer, in tokens.

    Raises:
        TokenselError: no examples, or a judge that does not fit the model's features or was trained under
            the metric "reader", which is measured on images of its own.
    """

    def __init__(
        self,
        vlm: Vlm,
        examples: Sequence[Example],
        scorers: Mapping[str, Scorer],
        judge: MaskedAutoencoder,
        max_new_tokens: int = 24,
    ):
        if not examples:
            raise TokenselError("no examples: give at least one image with a question")
        self.vlm, self.examples, self.scorers, self.judge = vlm, list(examples), dict(scorers), judge
        self.max_new_tokens = max_new_tokens
        prompts = [vlm.prompt(example.question) for example in self.examples]
        self.encoded = encode(vlm.model, vlm.inputs([example.image for example in self.examples], prompts))
        processor = vlm.processor.image_processor
        statistics = (processor.image_mean, processor.image_std)
        # the judge stays where the caller loaded it, which need not be where the model runs
        self.features = self.encoded.features.to(judge.reconstructor.device)
        self.features = replace(self.features, tokens=self.features.tokens.float())
        self.metric = self._metric()
        measured = self.metric(self.features.real())
        self.typical = (measured - measured.mean(0)).square().sum(-1).mean().sqrt()
        self.tiled = [overlays.tiled_image(self.encoded, n, statistics) for n in range(len(self.examples))]

    def step(self, method: str, keep: float) -> list[dict[str, Any]]:
        """One step of every example, with the fraction ``keep`` of its visual tokens.

        Raises:
            TokenselError: an unknown method, ``keep`` outside (0, 1], or a scorer that does not fit.
        """
        if method not in self.scorers:
            raise TokenselError(f"method '{method}' is unknown here: choose one of {', '.join(self.scorers)}")
        # the book's choice for its small models, see tokensel.vlm.Choices
        reduced = reduce(self.encoded, self.scorers[method], keep, thumbnail="last")
        valid = self.encoded.layout.valid
        assert reduced.kept is not None, "a scorer drops whole cells"
        errors = self.errors(reduced.kept)
        steps = self._answers(reduced)
        for tiled, step in zip(self.tiled, steps):
            kept_maps, valid_maps, error_maps = map(tiled.maps, (reduced.kept, valid, errors))
            step["kept"] = [cell_codes(*view) for view in zip(kept_maps, valid_maps)]
            step["error"] = [(100 * view).round().int().flatten().tolist() for view in error_maps]
            step["mean_error"] = round(float(errors[tiled.tiles][valid[tiled.tiles]].mean()), 3)
        return steps

    def baselines(self) -> list[dict[str, Any]]:
        """Every example without steps: its views, and the answers with all tokens and without an image."""
        full = self._answers(reduce(self.encoded))
        prompts = [self.vlm.prompt(example.question, False) for example in self.examples]
        none = self._answers(reduce(encode(self.vlm.model, self.vlm.inputs(None, prompts))))
        return [
            {
                "name": example.name,
                "question": example.question,
                "answers": list(example.answers),
                "views": views(tiled),
                "tiles": [tiled.rows, tiled.columns],
                "full": with_all,
                "none": without,
            }
            for example, tiled, with_all, without in zip(self.examples, self.tiled, full, none)
        ]

    def data(self, keeps: Sequence[float], progress: bool = True) -> dict[str, Any]:
        """Everything the static explorer needs, for every method and each of ``keeps``.

        Args:
            keeps: fractions of the visual tokens kept, in (0, 1].
            progress: show a progress bar.
        """
        entries = self.baselines()
        for entry in entries:
            entry["steps"] = {method: [] for method in self.scorers}
        todo = [(method, keep) for method in self.scorers for keep in keeps]
        for method, keep in tqdm(todo, desc="explorer", unit="step", disable=not progress):
            for entry, step in zip(entries, self.step(method, keep)):
                entry["steps"][method].append(step)
        return {
            "kind": "tokens",
            "model": self.vlm.name,
            "keeps": list(keeps),
            "methods": {method: style.label(method) for method in self.scorers},
            "examples": entries,
        }

    @torch.no_grad()
    def errors(self, kept: Bool[Tensor, "tiles tokens"]) -> Float[Tensor, "tiles tokens"]:
        """Distance of each token from its reconstruction; 1 = that of a typical token from the mean token.

        Args:
            kept: True = kept, on any device.

        Returns:
            The distances, on the host.
        """
        tokens = self.features.tokens
        restored = self.judge(tokens, kept.to(tokens.device))
        return ((self.metric(restored) - self.metric(tokens)).norm(dim=-1) / self.typical).cpu()

    def _metric(self) -> Metric:
        """Where the judge was trained to be close."""

        def sensitivity() -> Tensor:
            raise TokenselError(
                "the judge was trained under the metric 'reader': give one of another, such as projector"
            )

        source = MetricSource(lambda: [self.features], lambda: self.vlm, sensitivity)
        name = self.judge.reconstructor.config.metric or "features"
        return make_metric(name, source, self.features.tokens.device)

    def _answers(self, reduced: Reduced) -> list[dict[str, Any]]:
        answers = self.vlm.generate(reduced, self.max_new_tokens)
        return [
            {"tokens": int(n), "answer": answer, "score": example.score(answer)}
            for example, answer, n in zip(self.examples, answers, reduced.n_visual)
        ]


def views(tiled: overlays.TiledImage) -> list[dict[str, Any]]:
    """The thumbnail and the full image as the model receives them, with their rows and columns of tokens."""
    rows, columns = tiled.rows * tiled.cells, tiled.columns * tiled.cells
    return [
        {"name": "thumbnail", "image": _uri(tiled.thumbnail), "rows": tiled.cells, "columns": tiled.cells},
        {"name": "full size", "image": _uri(tiled.full), "rows": rows, "columns": columns},
    ]


def cell_codes(kept: Bool[Tensor, "rows columns"], valid: Bool[Tensor, "rows columns"]) -> str:
    """One letter for each cell, row by row: ``1`` kept, ``0`` dropped, ``-`` no token."""
    codes = (kept.long() + 1) * valid.long()
    return "".join("-01"[code] for code in codes.flatten().tolist())


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
