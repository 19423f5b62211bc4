"""The book: open a chapter, run the chapters, build the site.

Chapters import `open_chapter`, `illustrated`, `claims_table` and `interval`; the command line mounts `app`.
"""

from tokensel.book.site.chapter import Chapter, find_root, open_chapter
from tokensel.book.site.claims import claims_table, interval
from tokensel.book.site.cli import app
from tokensel.book.site.suites import illustrated

__all__ = ["Chapter", "app", "claims_table", "find_root", "illustrated", "interval", "open_chapter"]
