"""The numbers of every figure as CSV: the kernel puts them beside the image, the build a link below it.

In an executed notebook a figure's output holds its numbers as ``text/csv``, which Jupyter does not show.
"""

import io
import json
import re
from typing import Any

import nbformat
import pandas as pd

from tokensel.utils.errors import TokenselError

CSV = "text/csv"
IMAGES = ("image/png", "image/svg+xml", "image/jpeg")
EXPLORER = re.compile(r'<div class="explorer">\s*<script type="application/json">(.*?)</script>', re.DOTALL)


def record_figures(shell: Any) -> None:
    """Let an IPython shell put the numbers of each figure that it displays into the figure's output.

    A second call changes nothing. Papermill and Jupyter keep the numbers and show the image only.
    """
    from IPython.core.formatters import BaseFormatter, catch_format_error
    from matplotlib.figure import Figure
    from traitlets import Unicode

    from tokensel.figures import numbers

    class CsvFormatter(BaseFormatter):
        format_type = Unicode(CSV)

        # not by for_type: the import of pyplot takes Figure out of every formatter that is registered so far
        @catch_format_error
        def __call__(self, obj: Any) -> str | None:
            return _csv(numbers.table(obj)) if isinstance(obj, Figure) else None

    shell.display_formatter.formatters[CSV] = CsvFormatter(parent=shell.display_formatter)


def link_figures(page: nbformat.NotebookNode, name: str, up: str = "..") -> dict[str, str]:
    """Put a link to its numbers below each figure of an executed chapter; returns the files to write.

    Args:
        page: the chapter, changed in place.
        name: of the chapter; its files are named after it.
        up: from the page's folder to the root of the site.

    Returns:
        CSV by the name of its file in ``_static/numbers``.

    Raises:
        TokenselError: a figure without numbers.
    """
    files: dict[str, str] = {}
    for cell in page.cells:
        if cell.cell_type != "code" or {"remove-output", "remove-cell"} & set(cell.metadata.get("tags", [])):
            continue
        outputs = []
        for output in cell.outputs:
            outputs.append(output)
            data = output.get("data", {})
            table = data.pop(CSV, "") or _explorer_table(data.get("text/html", ""))
            if not table and not any(kind in data for kind in IMAGES):
                continue
            if not has_numbers(table):
                raise TokenselError(
                    f"{name}, cell {cell.id}: a figure has no numbers to link; call open_chapter before it "
                    "is drawn, draw it by matplotlib, and run the chapter again"
                )
            file = f"{name}-{len(files) + 1}.csv"
            files[file] = table
            link = f'<p class="numbers"><a href="{up}/_static/numbers/{file}" download>numbers as CSV</a></p>'
            outputs.append(nbformat.v4.new_output("display_data", {"text/html": link, "text/plain": file}))
        cell.outputs = outputs
    return files


def has_numbers(text: str) -> bool:
    """Whether a CSV has a column with at least one number."""
    table = pd.read_csv(io.StringIO(text)) if text.strip() else pd.DataFrame()
    return bool(table.select_dtypes("number").notna().any(axis=None))


def _explorer_table(html: str) -> str:
    """The steps that an explorer offers, one a row; empty for HTML without an explorer."""
    found = EXPLORER.search(html)
    if not found:
        return ""
    data = json.loads(found[1])
    rows = []
    for example in data["examples"]:
        for method, steps in example["steps"].items():
            # without budgets a step is one more token of the answer
            places = data.get("keeps") or range(1, len(steps) + 1)
            for place, step in zip(places, steps, strict=True):
                row = {"example": example["name"], "method": data["methods"][method]}
                row["keep" if "keeps" in data else "token"] = place
                # what is one entry a cell is drawn, not listed
                rows.append(row | {key: value for key, value in step.items() if not isinstance(value, list)})
    return _csv(pd.DataFrame(rows))


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
