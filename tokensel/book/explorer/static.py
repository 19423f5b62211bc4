"""The explorer in a page without a kernel: an embedded dictionary, and a still figure without JavaScript."""

import base64
import html
import io
import json
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from tokensel.figures import overlays, style
from tokensel.utils.errors import TokenselError


def plot_step(example: dict[str, Any], step: dict[str, Any], width: float = 7.0) -> Figure:
    """Kept tokens above, reconstruction errors below, for each view of an image.

    Args:
        example: one of ``data["examples"]``.
        step: one of its steps, see :class:`tokensel.book.explorer.steps.Exploration`.
        width: of the figure in inches, at most that of the page's column.
    """
    width = style.fit(width)
    views = example["views"]
    images = [open_image(view["image"]) for view in views]
    ratios = [0.6 if number == 0 else image.width / image.height for number, image in enumerate(images)]
    height = 2 * width / sum(ratios) + 0.5
    figure, axes = plt.subplots(2, len(views), figsize=(width, height), width_ratios=ratios, squeeze=False)
    for column, (view, image) in enumerate(zip(views, images)):
        kept, valid = _masks(step["kept"][column], view)
        error = torch.tensor(step["error"][column], dtype=torch.float32).view(valid.shape) / 100 * valid
        overlays.show(axes[0, column], image, kept, f"{view['name']}: kept", valid)
        overlays.heat(axes[1, column], image, error, f"{view['name']}: error", top=1.0)
    return figure


def _masks(cells: str, view: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which cells of a view are kept, and which are tokens at all (letterbox cells are not)."""
    letters = np.array(list(cells)).reshape(view["rows"], view["columns"])
    return torch.from_numpy(letters == "1"), torch.from_numpy(letters != "-")


def _still_tokens(data: dict[str, Any]) -> tuple[Figure, str]:
    """The first example under the first method at the middle budget, and the same in words."""
    example, method = data["examples"][0], next(iter(data["methods"]))
    middle = len(data["keeps"]) // 2
    step = example["steps"][method][middle]
    words = (
        f"The image “{example['name']}” under {data['methods'][method]} at keep {data['keeps'][middle]:g}: "
        f"{step['tokens']} of {example['full']['tokens']} tokens kept. "
        f"Asked “{example['question']}”, the model answers “{step['answer']}”; "
        f"with all tokens “{example['full']['answer']}”."
    )
    return plot_step(example, step), words


def _still_answer(data: dict[str, Any]) -> tuple[Figure, str]:
    """The first example under the first schedule, in the middle of the answer."""
    example, (method, label) = data["examples"][0], next(iter(data["methods"].items()))
    steps = example["steps"][method]
    step = steps[len(steps) // 2]
    words = (
        f"The image “{example['name']}” while “{example['question']}” is answered under {label}: after "
        f"“{step['text']}”, {step['tokens']} of {example['tokens']} tokens are left; the full answer is "
        f"“{steps[-1]['text']}”."
    )
    images = [open_image(view["image"]) for view in example["views"]]
    ratios = [0.6, images[1].width / images[1].height]
    width = style.fit(7.0)
    figure, axes = plt.subplots(1, 2, figsize=(width, width / sum(ratios) + 0.3), width_ratios=ratios)
    for ax, view, image, cells in zip(axes, example["views"], images, step["kept"]):
        kept, valid = _masks(cells, view)
        overlays.show(ax, image, kept, f"{view['name']}: left", valid)
    return figure, words


# for each kind of explorer, what a reader without JavaScript gets: a figure and its description
STILLS: dict[str, Callable[[dict[str, Any]], tuple[Figure, str]]] = {
    "tokens": _still_tokens,
    "answer": _still_answer,
}


def embed(data: dict[str, Any]) -> str:
    """An explorer as a piece of HTML that needs neither kernel nor network.

    Args:
        data: a dictionary whose ``kind`` is a key of :data:`STILLS`.

    Raises:
        TokenselError: another kind.
    """
    if data.get("kind") not in STILLS:
        raise TokenselError(f"explorer of kind {data.get('kind')!r}: choose one of {', '.join(STILLS)}")
    figure, words = STILLS[data["kind"]](data)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    plt.close(figure)
    still = base64.b64encode(file.getvalue()).decode()
    # inside a script element only "<" could end it
    steps = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<div class="explorer">\n'
        f'<script type="application/json">{steps}</script>\n'
        '<figure class="explorer-still">\n'
        f'<img alt="{html.escape(words)}" src="data:image/png;base64,{still}">\n'
        f"<figcaption>{html.escape(words)}</figcaption>\n"
        "</figure>\n</div>"
    )


def open_image(uri: str) -> Image.Image:
    """The image in a ``data:`` URI."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
