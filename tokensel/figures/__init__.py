"""Figures: kept tokens over an image, curves over keep and cost, and one plotting style."""

from tokensel.utils.errors import needs

with needs("figures"):  # here, since Python imports this file before any module of the room
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401

from tokensel.figures import curves, overlays, style

__all__ = ["curves", "overlays", "style"]
