"""The explorer with a kernel behind it: steps are computed as they are asked for, on any picture."""

import io
from collections.abc import Mapping, Sequence
from html import escape

import ipywidgets as widgets
import matplotlib.pyplot as plt
from PIL import Image, UnidentifiedImageError

from tokensel.book.explorer.page import draw_step
from tokensel.book.explorer.steps import Exploration, Subject
from tokensel.figures import style
from tokensel.scorers import Scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.vlm import Vlm

OWN = "my picture"


class LiveExplorer:
    """Controls and picture, to be displayed in a notebook: ``LiveExplorer(...).widget``.

    Args:
        vlm: the model to ask.
        subjects: what can be chosen; the reader may bring a picture and a question too.
        scorers: the ways to choose, by name.
        judge: the reconstructor that measures the errors.
        keeps: the budgets on the slider, fractions of the visual tokens.
    """

    def __init__(
        self,
        vlm: Vlm,
        subjects: Sequence[Subject],
        scorers: Mapping[str, Scorer],
        judge: MaskedAutoencoder,
        keeps: Sequence[float],
    ):
        self.vlm, self.scorers, self.judge = vlm, dict(scorers), judge
        self.subjects = {subject.name: subject for subject in subjects}
        self.open: tuple[Subject, Exploration, dict] | None = None
        self.picture = widgets.Dropdown(options=list(self.subjects), description="picture")
        self.question = widgets.Text(description="question", continuous_update=False)
        self.method = widgets.Dropdown(
            options=[(style.label(name), name) for name in scorers], description="method"
        )
        self.keep = widgets.SelectionSlider(
            options=[(f"{100 * keep:g} %", keep) for keep in keeps],
            value=keeps[len(keeps) // 2],
            description="keep",
            continuous_update=False,
        )
        self.upload = widgets.FileUpload(accept="image/*", description="my picture")
        self.words = widgets.HTML()
        self.drawing = widgets.Image(format="png")
        self.widget = widgets.VBox(
            [
                widgets.HBox([self.picture, self.upload]),
                self.question,
                widgets.HBox([self.method, self.keep]),
                self.words,
                self.drawing,
            ]
        )
        self.question.value = subjects[0].question
        self.picture.observe(self._choose, "value")
        self.upload.observe(self._bring, "value")
        for control in (self.question, self.method, self.keep):
            control.observe(self._draw, "value")
        self._draw()

    def _choose(self, change: dict) -> None:
        asked = self.subjects[change["new"]].question
        if self.question.value == asked:
            self._draw()
        else:
            self.question.value = asked  # draws

    def _bring(self, change: dict) -> None:
        try:
            image = Image.open(io.BytesIO(change["new"][0]["content"])).convert("RGB")
        except (UnidentifiedImageError, OSError):
            self.words.value = "This file is no picture that can be read: give a PNG or JPEG."
            return
        self.subjects[OWN] = Subject(OWN, image, self.question.value)
        self.open = None
        self.picture.options = list(self.subjects)
        self.picture.value = OWN

    def _subject(self) -> Subject:
        """The chosen subject; under another question its right answer is not known."""
        chosen, asked = self.subjects[self.picture.value], self.question.value
        return chosen if asked == chosen.question else Subject(chosen.name, chosen.image, asked)

    def _draw(self, _: dict | None = None) -> None:
        self.words.value = "computing …"
        subject = self._subject()
        if self.open is None or self.open[0] != subject:
            exploration = Exploration(self.vlm, [subject], self.scorers, self.judge)
            self.open = (subject, exploration, exploration.pictures()[0])
        _, exploration, picture = self.open
        beside = (name for name in ("selector", "random") if name in self.scorers)
        steps = {
            name: exploration.step(name, self.keep.value)[0]
            for name in dict.fromkeys([self.method.value, *beside])
        }
        figure = draw_step(picture, steps[self.method.value])
        file = io.BytesIO()
        figure.savefig(file, format="png")
        plt.close(figure)
        self.drawing.value = file.getvalue()
        self.words.value = answers_table(picture, steps)


def answers_table(picture: dict, steps: dict[str, dict]) -> str:
    """The answers with all tokens, with those of each method, and with none, as HTML."""
    lines = {"all tokens": picture["full"]} | {style.label(name): step for name, step in steps.items()}
    rows = "".join(
        f"<tr><td>{name}</td><td>{line['tokens']}</td><td>{escape(line['answer'])}</td>"
        f"<td>{line.get('mean_error', '')}</td></tr>"
        for name, line in (lines | {"no image": picture["none"]}).items()
    )
    right = f"<p>Right: {escape(' or '.join(picture['answers']))}</p>" if picture["answers"] else ""
    return (
        f"<table><tr><th>sees</th><th>tokens</th><th>answer</th><th>mean error</th></tr>{rows}</table>{right}"
    )
