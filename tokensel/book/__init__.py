"""The book: open a chapter, run the chapters, build the site.

Chapters import `open_chapter`; the command line mounts `app`.
"""

from tokensel.book.chapter import Chapter, find_root, open_chapter
from tokensel.book.cli import app

__all__ = ["Chapter", "app", "find_root", "open_chapter"]
