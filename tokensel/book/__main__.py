"""``python -m tokensel.book``."""

import sys

from tokensel.book.cli import app
from tokensel.errors import TokenselError

try:
    app()
except TokenselError as error:
    sys.exit(f"error: {error}")
