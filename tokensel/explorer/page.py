"""The explorer in a page without a kernel: the dictionary embedded, and a still figure until a script takes over."""

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

from tokensel.errors import TokenselError
from tokensel.figures import overlays


def draw_step(picture: dict[str, Any], step: dict[str, Any], width: float = 7.0) -> Figure:
    """Kept tokens above, reconstruction errors below, for each view of a picture.

    Args:
        picture: one of ``data["pictures"]``.
        step: one of its steps, see :class:`tokensel.explorer.steps.Exploration`.
        width: of the figure in inches.
    """
    views = picture["views"]
    images = [open_image(view["image"]) for view in views]
    shares = [0.6 if number == 0 else image.width / image.height for number, image in enumerate(images)]
    height = 2 * width / sum(shares) + 0.5
    figure, axes = plt.subplots(2, len(views), figsize=(width, height), width_ratios=shares, squeeze=False)
    for column, (view, image) in enumerate(zip(views, images)):
        shape = (view["rows"], view["columns"])
        letters = np.array(list(step["kept"][column])).reshape(shape)
        kept, real = torch.from_numpy(letters == "1"), torch.from_numpy(letters != "-")
        error = torch.tensor(step["error"][column], dtype=torch.float32).view(shape) / 100 * real
        overlays.show(axes[0, column], image, kept, f"{view['name']}: kept", real)
        overlays.heat(axes[1, column], image, error, f"{view['name']}: error", top=1.0)
    return figure


def _still_tokens(data: dict[str, Any]) -> tuple[Figure, str]:
    """The first picture under the first method at the middle budget, and what is to be seen there in words."""
    picture, method = data["pictures"][0], next(iter(data["methods"]))
    middle = len(data["keeps"]) // 2
    step = picture["steps"][method][middle]
    words = (
        f"The picture “{picture['name']}” under {data['methods'][method]} at keep {data['keeps'][middle]:g}: "
        f"{step['tokens']} of {picture['full']['tokens']} tokens kept. Asked “{picture['question']}”, the model answers "
        f"“{step['answer']}”; with all tokens “{picture['full']['answer']}”."
    )
    return draw_step(picture, step), words


# what a reader without JavaScript sees of each kind of explorer: the figure, and what it shows in words
STILLS: dict[str, Callable[[dict[str, Any]], tuple[Figure, str]]] = {"tokens": _still_tokens}


def embed(data: dict[str, Any]) -> str:
    """An explorer as a piece of HTML that needs no kernel and no network.

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
    """The picture in a ``data:`` address."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")
