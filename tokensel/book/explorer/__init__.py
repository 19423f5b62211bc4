"""The explorer: choose an image, a method and a budget; see which tokens are kept and what the model answers.

``steps`` computes a plain dictionary, and ``generation`` computes one for an answer during which tokens are
dropped. ``static`` embeds either in a web page, where ``explorer.js`` draws it without a kernel. ``live``
computes each step on request.

To add another kind of explorer, add three things: a dictionary with a new ``kind``, a function in
``explorer.js`` that draws it, and an entry in :data:`tokensel.book.explorer.static.STILLS` for readers
without JavaScript.
"""

from pathlib import Path

from tokensel.book.explorer.generation import generation_steps
from tokensel.book.explorer.static import embed
from tokensel.book.explorer.steps import Example, Exploration

SCRIPT = Path(__file__).parent / "explorer.js"  # draws the dictionaries in a page

__all__ = ["SCRIPT", "Example", "Exploration", "embed", "generation_steps"]
