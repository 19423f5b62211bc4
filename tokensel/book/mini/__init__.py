"""The book's small world: drawn pages, their questions, and the recipe of the small models."""
