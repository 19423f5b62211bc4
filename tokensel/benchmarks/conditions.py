"""How a question is asked, and which conditions a table compares.

This file imports nothing heavy, so that options are checked at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError

__all__ = ["Condition", "parse_pairs", "split_keep"]


@dataclass(frozen=True, order=True)
class Condition:
    """How a question is asked: which method selects tokens, what fraction it keeps, with which seed."""

    method: str
    keep: float
    seed: int


def split_keep(side: str) -> tuple[str, float | None]:
    """``"fastv@0.3"`` -> ``("fastv", 0.3)``; ``None`` where no keep is given."""
    method, at, keep = side.partition("@")
    return method, float(keep) if at else None


def parse_pairs(pairs: Iterable[str]) -> list[tuple[str, str]]:
    """``["selector:random"]`` -> ``[("selector", "random")]``; either side may give its keep: ``fastv@0.3``.

    Raises:
        TokenselError: an entry is not two names separated by a colon, or a keep is no number.
    """
    parsed = []
    for pair in pairs:
        method, colon, against = pair.partition(":")
        if not (method and colon and against) or ":" in against:
            raise TokenselError(
                f"compare is {pair!r}: give two methods separated by a colon, such as selector:random"
            )
        try:
            for side in (method, against):
                split_keep(side)
        except ValueError:
            raise TokenselError(f"compare is {pair!r}: give a number after @, such as fastv@0.3") from None
        parsed.append((method, against))
    return parsed
