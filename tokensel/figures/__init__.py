"""Figures: one style, kept tokens over a picture, curves over keep, a page of the Principia."""

from tokensel.utils.errors import needs

with needs("figures"):  # here, since Python imports this file before any module of the room
    import matplotlib  # noqa: F401
    import pandas  # noqa: F401
