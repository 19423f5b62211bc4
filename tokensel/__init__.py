"""tokensel: keep the visual tokens from which the others can be reconstructed."""

__version__ = "0.1.0"
