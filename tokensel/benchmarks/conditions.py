"""How a question is asked, and which conditions a table compares.

This file imports nothing heavy, so that options are checked at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError

__all__ = ["Condition", "check_pairs", "parse_pairs", "split_keep"]


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


def check_pairs(pairs: Iterable[str], conditions: Iterable[Condition]) -> None:
    """Check that both sides of every pair are among the conditions.

    Raises:
        TokenselError: a method that is not run, or not at the keep that its side names.
    """
    keeps: dict[str, set[float]] = {}
    for condition in conditions:
        keeps.setdefault(condition.method, set()).add(condition.keep)
    for side in (side for pair in parse_pairs(pairs) for side in pair):
        method, keep = split_keep(side)
        if method not in keeps:
            raise TokenselError(
                f"compare names {method!r}, which is not run: give methods among {', '.join(keeps)}"
            )
        if keep is not None and keep not in keeps[method]:
            known = ", ".join(f"{known:g}" for known in sorted(keeps[method]))
            raise TokenselError(
                f"compare names {side!r}, but {method} is run at keep {known}: give one of these"
            )
