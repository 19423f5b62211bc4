"""The explorer with a kernel behind it: steps are computed on request, for any image."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt

from tokensel.book.explorer.static import plot_step
from tokensel.book.explorer.steps import Example, Exploration
from tokensel.data.images import as_image
from tokensel.figures import style
from tokensel.scorers import Scorer
from tokensel.training.autoencoder import MaskedAutoencoder
from tokensel.utils.errors import TokenselError, reason
from tokensel.vlm import Vlm

OWN = "my image"


class LiveExplorer:
    """Controls and a drawing, to be displayed in a notebook: ``LiveExplorer(...).widget``.

    Args:
        vlm: the model to ask.
        examples: what can be chosen; the reader may bring an image and a question too.
        scorers: the scorers to choose from, by name.
        judge: the reconstructor that measures the errors.
        keeps: the budgets on the slider, fractions of the visual tokens.
    """

    def __init__(
        self,
        vlm: Vlm,
        examples: Sequence[Example],
        scorers: Mapping[str, Scorer],
        judge: MaskedAutoencoder,
        keeps: Sequence[float],
    ):
        self.vlm, self.scorers, self.judge = vlm, dict(scorers), judge
        self.examples = {example.name: example for example in examples}
        self.current: tuple[Example, Exploration, dict[str, Any]] | None = None
        self.image = widgets.Dropdown(options=list(self.examples), description="image")
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
        self.upload = widgets.FileUpload(accept="image/*", description=OWN)
        self.words = widgets.HTML()
        self.drawing = widgets.Image(format="png")
        self.widget = widgets.VBox(
            [
                widgets.HBox([self.image, self.upload]),
                self.question,
                widgets.HBox([self.method, self.keep]),
                self.words,
                self.drawing,
            ]
        )
        self.question.value = examples[0].question
        self.image.observe(self._choose, "value")
        self.upload.observe(self._upload, "value")
        for control in (self.question, self.method, self.keep):
            control.observe(self._redraw, "value")
        self._redraw()

    def _choose(self, change: dict[str, Any]) -> None:
        """Show the chosen image with its own question."""
        asked = self.examples[change["new"]].question
        if self.question.value == asked:
            self._redraw()
        else:
            self.question.value = asked  # its observer redraws

    def _upload(self, change: dict[str, Any]) -> None:
        """Show the uploaded image, whether or not another one was uploaded before."""
        if not change["new"]:  # the reader has cleared the upload: the last image stays
            return
        file = change["new"][0]
        try:
            image = as_image(file["content"], str(file["name"]))
        except TokenselError as error:
            self.words.value = f"<p>{escape(str(error))}</p>"
            return
        self.examples[OWN] = Example(OWN, image, str(self.question.value))
        if self.image.value == OWN:
            self._redraw()  # the choice does not change, so its observer would not be called
        else:
            self.image.options = list(self.examples)
            self.image.value = OWN

    def _example(self) -> Example:
        """The chosen example; under another question its right answer is not known."""
        chosen, asked = self.examples[str(self.image.value)], str(self.question.value)
        return chosen if asked == chosen.question else Example(chosen.name, chosen.image, asked)

    def _redraw(self, _: dict[str, Any] | None = None) -> None:
        """Compute the current step; an error is shown in place of the answers."""
        self.words.value = "computing …"
        try:
            self._compute()
        except (
            Exception
        ) as error:  # a notebook drops what a callback raises, and the reader would wait for ever
            self.current = None
            self.drawing.value = b""
            self.words.value = f"<p>{escape(reason(error))}</p>"

    def _compute(self) -> None:
        example, method = self._example(), str(self.method.value)
        if self.current is None or self.current[0] != example:
            exploration = Exploration(self.vlm, [example], self.scorers, self.judge)
            self.current = (example, exploration, exploration.baselines()[0])
        _, exploration, baseline = self.current
        compared = (name for name in ("selector", "random") if name in self.scorers)
        steps = {
            name: exploration.step(name, self.keep.value)[0] for name in dict.fromkeys([method, *compared])
        }
        figure = plot_step(baseline, steps[method])
        file = io.BytesIO()
        figure.savefig(file, format="png")
        plt.close(figure)
        self.drawing.value = file.getvalue()
        self.words.value = answers_table(baseline, steps)


def answers_table(example: dict[str, Any], steps: dict[str, dict[str, Any]]) -> str:
    """The answers with all tokens, with those of each method, and without an image, as HTML."""
    lines = {"all tokens": example["full"]} | {style.label(name): step for name, step in steps.items()}
    rows = "".join(
        f"<tr><td>{name}</td><td>{line['tokens']}</td><td>{escape(line['answer'])}</td>"
        f"<td>{line.get('mean_error', '')}</td></tr>"
        for name, line in (lines | {"no image": example["none"]}).items()
    )
    right = f"<p>Right: {escape(' or '.join(example['answers']))}</p>" if example["answers"] else ""
    head = "<tr><th>the model sees</th><th>tokens</th><th>answer</th><th>mean error</th></tr>"
    return f"<table>{head}{rows}</table>{right}"
