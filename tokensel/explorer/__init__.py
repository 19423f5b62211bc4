"""The explorer: choose a picture, a way to choose and a budget, and see what is kept and what the model answers.

``steps`` computes a plain dictionary, ``writing`` one of an answer that is written while tokens leave. ``page`` embeds either in a web page where ``_static/explorer.js`` draws it without
a kernel, ``live`` computes it as it is asked for. Another explorer is another ``kind`` of dictionary, one function
in ``explorer.js`` that draws it, and one in :data:`tokensel.explorer.page.STILLS` for readers without JavaScript.
"""

from tokensel.explorer.page import embed
from tokensel.explorer.steps import Exploration, Subject
from tokensel.explorer.writing import write_steps

__all__ = ["Exploration", "Subject", "embed", "write_steps"]
