"""Figures: one style, kept tokens over a picture, curves over keep, a page of the Principia."""
