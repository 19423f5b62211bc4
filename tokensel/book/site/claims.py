"""The table "the paper says / measured here" of a chapter that tests a claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokensel.utils.errors import TokenselError

if TYPE_CHECKING:
    from IPython.display import Markdown

HEADS = ("claim", "the paper says", "measured here")


def claims_table(rows: Sequence[tuple[str, ...]], **setting: object) -> Markdown:
    """A chapter's claims side by side with its measurements, to be the last line of a code cell.

    Args:
        rows: the claim, what the paper reports with its place there ("Fig. 4: 1.2 points lost"), and what
            this run measured, as :func:`interval` writes it. All three may hold Markdown and formulas.
        setting: how it was measured, written below the table: model, data, n, seed, device.

    Raises:
        TokenselError: no rows, or a row that is not three non-empty texts.
    """
    from IPython.display import Markdown

    if not rows:
        raise TokenselError("claims_table: no rows; give at least one (claim, paper, here)")
    for row in rows:
        if len(row) != 3 or not all(text.strip() for text in row):
            raise TokenselError(
                f"claims_table: {row!r} is not (claim, paper, here), three texts with something in them"
            )
    lines = [HEADS, ("---",) * 3, *(tuple(_cell(text) for text in row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if not setting:
        return Markdown(table)
    items = "; ".join(f"{name}: {_cell(str(value))}" for name, value in setting.items())
    brackets = " Brackets hold 95 % intervals." if "[" in table else ""
    return Markdown(f"{table}\n\nMeasured with {items}.{brackets}")


def interval(mean: float, low: float, high: float, unit: str = "", digits: int = 1) -> str:
    """A measurement with its 95 % interval: "2.3 points [1.2, 3.4]" of 2.31, 1.2, 3.4 and "points".

    Args:
        mean: the estimate.
        low: lower end of the interval.
        high: upper end.
        unit: written after the estimate.
        digits: after the decimal point.

    Raises:
        TokenselError: the estimate is not a number between the two ends.
    """
    if not low <= mean <= high:
        raise TokenselError(f"interval: {mean} does not lie between {low} and {high}")
    number, ends = f"{mean:.{digits}f}", f"[{low:.{digits}f}, {high:.{digits}f}]"
    return f"{number} {unit} {ends}" if unit else f"{number} {ends}"


def _cell(text: str) -> str:
    # a line break or a bar would end the cell
    return " ".join(text.split()).replace("|", "\\|")
