"""How a question was asked, and which conditions a table compares.

Imports no other package, so that options are checked at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError


@dataclass(frozen=True, order=True)
class Condition:
    """How a question was asked: which method chose tokens, what fraction it kept, with which seed."""

    method: str
    keep: float
    seed: int


def split_keep(side: str) -> tuple[str, float | None]:
    """``"fastv@0.3"`` -> ``("fastv", 0.3)``; without a keep ``None`` stands for it."""
    method, at, keep = side.partition("@")
    return method, float(keep) if at else None


def parse_pairs(pairs: Iterable[str]) -> list[tuple[str, str]]:
    """``["selector:random"]`` -> ``[("selector", "random")]``; either side may name its keep: ``fastv@0.3``.

    Raises:
        TokenselError: an entry is not two names with a colon between, or a keep is no number.
    """
    parsed = []
    for pair in pairs:
        method, colon, against = pair.partition(":")
        if not (method and colon and against) or ":" in against:
            raise TokenselError(
                f"compare is {pair!r}: give two methods with a colon between, such as selector:random"
            )
        try:
            for side in (method, against):
                split_keep(side)
        except ValueError:
            raise TokenselError(f"compare is {pair!r}: give a number after @, such as fastv@0.3") from None
        parsed.append((method, against))
    return parsed
