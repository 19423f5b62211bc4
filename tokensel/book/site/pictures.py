"""Images of a benchmark on a page as they are: they hold no numbers, so they are no figures."""

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from IPython.display import HTML


def pictures(images: Mapping[str, Image.Image]) -> "HTML":
    """Images side by side with their captions below, to be the last line of a code cell.

    Args:
        images: by caption, which is also what a screen reader says.
    """
    from IPython.display import HTML

    parts = []
    for caption, image in images.items():
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
        text = html.escape(caption)
        parts.append(
            '<figure style="display: inline-block; margin: 0 1rem 0 0">'
            f'<img src="{source}" alt="{text}" style="width: 12rem"/><figcaption>{text}</figcaption></figure>'
        )
    return HTML("".join(parts))
