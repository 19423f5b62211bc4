"""How a question is asked, and which conditions a table compares.

This file imports nothing heavy, so that options are checked at once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokensel.utils.errors import TokenselError

__all__ = ["SERVED", "Condition", "check_pairs", "check_served", "parse_pairs", "split_keep"]

SERVED: dict[str, float | None] = {"full": 1.0, "none": 0.0, "served": None}
"""The methods of an evaluation through servers, and the keep of those that have one.

``full`` asks a server to keep all tokens, ``none`` asks it without the image. ``served`` is the method that
the server was started with, at each keep.
"""


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


def check_served(methods: Sequence[str], keeps: Sequence[float], server_keep: float | None) -> None:
    """Check that servers can be asked under ``methods``.

    Args:
        methods: those of the evaluation.
        keeps: its keeps.
        server_keep: the one keep of the servers, or ``None`` where each request has its own.

    Raises:
        TokenselError: a method of the model's own process, or a keep that the servers do not have.
    """
    for method in methods:
        if method not in SERVED:
            raise TokenselError(
                f"method {method}: give methods among {', '.join(SERVED)} with --server; which tokens served "
                "keeps is decided where the server is started"
            )
    if server_keep is None:
        return
    if any(keep != server_keep for keep in keeps):
        raise TokenselError(
            f"keeps is {', '.join(f'{keep:g}' for keep in keeps)} but --server-keep is {server_keep:g}: "
            "leave one of them out"
        )
    if "full" in methods and server_keep < 1:
        raise TokenselError(
            f"method full: servers that keep {server_keep:g} of every image cannot answer it; leave it out"
        )


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
