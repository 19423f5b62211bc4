"""The form of the chapters: what each of them has, and what they may claim."""

import ast
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from tokensel.book.site import claims, library_page, parameters, run
from tokensel.figures import style
from tokensel.utils.errors import TokenselError

ROOT = Path(__file__).parents[2]
CHAPTERS = run.chapter_paths(ROOT)


def test_every_notebook_is_in_the_table_of_contents_and_on_the_landing_page():
    assert sorted(CHAPTERS) == sorted((ROOT / "chapters").glob("*.ipynb"))
    landing = (ROOT / "index.md").read_text()
    assert [path.stem for path in CHAPTERS if f"[](chapters/{path.name})\n: " not in landing] == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_committed_as_it_should_be(path):
    book = nbformat.read(path, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs were committed"
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    lines = tagged[0].source.splitlines()
    for node in ast.parse(tagged[0].source).body:  # a long list goes on below its first line
        line = lines[node.lineno - 1]
        assert isinstance(node, ast.AnnAssign) and "  # " in line, f"untyped or uncommented parameter: {line}"
    wide = [line for cell in code for line in cell.source.splitlines() if len(line) > 88]
    assert not wide, "lines that scroll sideways"
    assert {"model"} <= set(parameters.declared(tagged[0].source).keys())
    lines = [line for cell in code for line in cell.source.splitlines()]
    assert max(map(len, lines)) <= 88, "code that scrolls sideways"
    assert f'open_chapter("{path.stem}")' in "\n".join(cell.source for cell in code)
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for part in (
        "**Why.**",
        "**What you will learn**",
        "**run time**",
        "**In the paper**",
        "\n## What was shown, and what not",
        "\n## Exercises",
    ):
        assert part in prose, f"no {part}"
    assert prose.count(":::{admonition} Solution\n:class: dropdown") >= 2, (
        "two exercises with folded solutions"
    )
    assert "hide-cell" in tagged[0].metadata["tags"], "the parameters belong folded"
    assert any("assert " in cell.source for cell in code)
    for cell in code:
        if "plt.show()" in cell.source or "sweep.plot(" in cell.source:
            assert len(cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")) > 60, cell.source[:60]


def figure_widths(source: str) -> list[float]:
    """The constant widths that code asks for figures, in inches; ``nan`` for one that :func:`style.fit`
    does not limit."""
    widths = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        options = {option.arg: option.value for option in call.keywords}
        width = options["figsize"] if "figsize" in options else options.get("width")
        if "figsize" in options and isinstance(width, ast.Tuple):
            width = width.elts[0]
        if isinstance(width, ast.Constant):
            widths.append(float(width.value))
        elif "figsize" in options and width is not None:
            fitted = ast.unparse(width).startswith(("style.fit(", "style.WIDTH"))
            widths.append(0.0 if fitted else float("nan"))
    return widths


def type_sizes(source: str) -> list[float]:
    """The constant sizes of type that code asks for, in points."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    options = [
        option for call in calls for option in call.keywords if option.arg in ("fontsize", "labelsize")
    ]
    return [float(option.value.value) for option in options if isinstance(option.value, ast.Constant)]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_figure_of_a_chapter_is_wider_than_the_page_or_has_smaller_type(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert all(width <= style.WIDTH for width in figure_widths(cell.source)), cell.source
            assert all(size >= style.LABEL for size in type_sizes(cell.source)), cell.source


def test_a_wide_figure_is_found():
    assert figure_widths("plt.subplots(figsize=(8.4, 2))") == [8.4]
    assert figure_widths("overlays.gallery(rows, titles, width=8.0)") == [8.0]
    assert figure_widths("plt.subplots(figsize=(style.fit(2.3 * n), 2))") == [0.0]
    assert np.isnan(figure_widths("plt.subplots(figsize=(2.3 * n, 2))")).all()
    assert type_sizes('ax.annotate("a", place, fontsize=7)') == [7.0]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_draws_from_every_suite_that_the_contract_allows(path):
    code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    # rows without an image or with several are left to evaluate()
    assert code.count("load_suite(") == code.count("illustrated(load_suite("), "draw from illustrated(...)"


EQUAL = pd.DataFrame({"a method": [1.0, 1.0]}, index=[0.1, 0.5])  # equal errors at two budgets


@pytest.mark.parametrize(
    ("stem", "claim", "names", "end", "middle"),
    [
        ("02_reconstruction", "difference", {"difference": 0.0}, {"keep": 1}, {"keep": 0.9}),
        ("05_what_it_keeps", "preference", {"preference": {"scan": (1.0, 1.0)}}, {"keep": 1}, {"keep": 0.4}),
        ("10_explorer", "errors", {"errors": EQUAL}, {"keeps": [0.5]}, {"keeps": [0.5, 0.1]}),
        ("12_onevision", "fewer", {"fewer": 3, "more": 3, "smallest": 1}, {"largest": 1}, {"largest": 2}),
        ("13_your_model", "share", {"share": 1.0}, {"keep": 1}, {"keep": 0.3}),
    ],
)
def test_a_claim_is_not_made_where_both_sides_are_equal_by_construction(stem, claim, names, end, middle):
    cells = nbformat.read(ROOT / "chapters" / f"{stem}.ipynb", as_version=4).cells
    trees = [ast.parse(cell.source) for cell in cells if cell.cell_type == "code"]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.If | ast.Assert)]

    def makes(node):
        asserts = [node] if isinstance(node, ast.Assert) else node.body
        return (
            len(asserts) == 1 and isinstance(asserts[0], ast.Assert) and claim in ast.unparse(asserts[0].test)
        )

    claim_made = next(filter(makes, nodes))
    exec(ast.unparse(claim_made), names | end)
    with pytest.raises(AssertionError):
        exec(ast.unparse(claim_made), names | middle)


def test_every_module_has_its_place_on_the_api_page():
    page = library_page.page(ROOT / "tokensel")
    assert page.count(".. automodule:: tokensel.scorers.random\n   :members:") == 1
    assert page.count(".. automodule:: tokensel.scorers\n```") == 1
    assert (
        page.index("tokensel.model.selector")
        < page.index("tokensel.training.train")
        < page.index("tokensel.utils.errors")
    )
    serving = ROOT / "tokensel" / "serving"
    extending = [serving / f"vllm_{name}.py" for name in ("cpu_worker", "llava", "processing", "qwen")]
    assert all(path.is_file() for path in extending)
    # without __main__ and what extends an engine that is not installed here
    assert page.count("automodule::") == len(list((ROOT / "tokensel").rglob("*.py"))) - 1 - len(extending)
    assert page.count("automodule:: tokensel.serving.vllm_plugin\n") == 1


def test_a_table_of_claims_has_a_row_for_each():
    rows = [
        ("Half of the tokens suffice", "Fig. 4: about 1 point", claims.interval(2.31, 1.2, 3.4, "points"))
    ]
    table = claims.claims_table([*rows, ("a | b", "$p = 0.1$", "no\ndifference")]).data
    assert table.splitlines()[0] == "| claim | the paper says | measured here |"
    assert (
        table.splitlines()[2]
        == "| Half of the tokens suffice | Fig. 4: about 1 point | 2.3 points [1.2, 3.4] |"
    )
    assert table.splitlines()[3] == "| a \\| b | $p = 0.1$ | no difference |"
    with_setting = claims.claims_table(rows, model="`mini`", n=400, seed=0).data
    assert with_setting.endswith(
        "|\n\nMeasured with model: `mini`; n: 400; seed: 0. Brackets hold 95 % intervals."
    )
    assert claims.interval(0.5, 0.5, 0.5, digits=2) == "0.50 [0.50, 0.50]"
    for bad in ([], [("a", "b")], [("a", "b", "")]):
        with pytest.raises(TokenselError, match="claims_table"):
            claims.claims_table(bad)
    with pytest.raises(TokenselError, match="does not lie between"):
        claims.interval(float("nan"), 0.0, 1.0)
