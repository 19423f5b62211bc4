"""The table of results in README.md, from a recorded table."""

import json
from pathlib import Path

import pandas as pd

from tokensel.benchmarks.statistics import average
from tokensel.figures import style
from tokensel.utils import files
from tokensel.utils.errors import TokenselError

BEGIN, END = "<!-- results: python -m tokensel book readme -->", "<!-- end of results -->"
KEEPS = (0.5, 0.3)
METHODS = ("selector", "random")


def results_table(table: pd.DataFrame) -> str:
    """Mean score of each group of benchmarks, 0 to 100: all tokens, some of them, no image; in Markdown.

    Args:
        table: the long table of results, scores 0..1, see :data:`tokensel.figures.curves.COLUMNS`.

    Raises:
        TokenselError: a method or budget of the table in the README was not evaluated.
    """
    columns = [("full", None), *((method, keep) for keep in KEEPS for method in METHODS), ("none", None)]
    heads = [style.label(method) + (f", {100 * keep:g} %" if keep else "") for method, keep in columns]
    lines = [
        "| tasks | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for group, rows in table.groupby("group", sort=False):
        cells = []
        for (method, keep), head in zip(columns, heads):
            chosen = rows.loc[(rows["method"] == method) & (True if keep is None else rows["keep"] == keep)]
            if chosen.empty:
                raise TokenselError(f"no results for {head} on {group}: evaluate it first")
            mean = average(chosen, "group").loc[group]
            cells.append(f"{mean['score']:.1f} ± {mean['reach']:.1f}")
        lines.append(f"| {group} ({rows['benchmark'].nunique()}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def runs_sentence(table: pd.DataFrame) -> str:
    """The selector's mean scores where each token brings its neighbours along, as a sentence in Markdown."""
    rows = table.loc[table["method"] == "selector"]
    parts = []
    for group, of_group in rows.groupby("group", sort=False):
        means = average(of_group, "keep")
        scores = (f"{means['score'][k]:.1f} ± {means['reach'][k]:.1f} at {100 * k:g} %" for k in KEEPS)
        parts.append(f"{group} {' and '.join(scores)}")
    return "; ".join(parts)


def _seeds(table: pd.DataFrame) -> str:
    seeds = sorted(table.loc[table["method"].isin(METHODS), "seed"].unique())
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def write(readme: Path, results: Path) -> None:
    """Replace the lines between the marks in ``readme`` by the table of ``results``.

    Raises:
        TokenselError: no such table or nothing that says where it is from, not whole, or no marks in the
            README.
    """
    provenance = results.with_suffix(".provenance.json")
    for path in (results, provenance):
        if not path.is_file():
            raise TokenselError(f"{path}: no such file; record both with python -m tokensel evaluate")
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise TokenselError(f"{readme} has no {BEGIN} and {END}: put them where the table belongs")
    table, origin = pd.read_csv(results), json.loads(provenance.read_text(encoding="utf-8"))
    note = (
        f"`{origin['model']['name']}` on its own tasks: mean score, 0 to 100, ± half of the 95 % interval, "
        f"{table['n'].to_numpy().min()} questions a task, {_seeds(table)}; "
        f"recorded {origin['date'][:10]} "
        f"on {origin['device']}, {origin['model']['dtype']}, in `{results}`. No figure of the paper."
    )
    lines = [note, "", results_table(table)]
    if (runs := results.with_name("neighbours.csv")).is_file():
        lines += [
            "",
            "In runs of a row (`neighbours=2`, chapter 18), with as many tokens, the same selector (seed 0) "
            f"reaches {runs_sentence(pd.read_csv(runs))} (`{runs}`).",
        ]
    files.write_text(readme, "\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]))
