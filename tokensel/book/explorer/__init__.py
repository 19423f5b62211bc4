"""The explorer: choose a picture, a way to choose and a budget, and see what is kept and what the model answers.

``steps`` computes a plain dictionary, ``writing`` one of an answer that is written while tokens leave. ``page`` embeds either in a web page where ``explorer.js`` draws it without
a kernel, ``live`` computes it as it is asked for. Another explorer is another ``kind`` of dictionary, one function
in ``explorer.js`` that draws it, and one in :data:`tokensel.book.explorer.page.STILLS` for readers without JavaScript.
"""

from pathlib import Path

from tokensel.book.explorer.page import embed
from tokensel.book.explorer.steps import Exploration, Subject
from tokensel.book.explorer.writing import write_steps

SCRIPT = Path(__file__).parent / "explorer.js"  # draws the dictionaries in a page

__all__ = ["SCRIPT", "Exploration", "Subject", "embed", "write_steps"]
