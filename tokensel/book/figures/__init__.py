"""Figures of the book's own."""
