"""The machinery of the book: which chapters run, with what, what a failure leaves, and clean pages."""

import ast
import json
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from tokensel.book.site import build as site
from tokensel.book.site import chapter, claims, library_page, numbers, offline, parameters, run, status
from tokensel.figures import style
from tokensel.utils.errors import TokenselError

ROOT = Path(__file__).parents[2]
CHAPTERS = run.chapter_paths(ROOT)


def notebook(*cells: tuple[str, str], tags: tuple[str, ...] = ("parameters",)) -> nbformat.NotebookNode:
    """Cells as (kind, source); the first code cell gets ``tags``."""
    made = []
    for number, (kind, source) in enumerate(cells):
        cell = nbformat.v4.new_markdown_cell(source) if kind == "md" else nbformat.v4.new_code_cell(source)
        cell.id = f"cell-{number}"
        if kind == "code" and tags:
            cell.metadata["tags"], tags = list(tags), ()
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(
        cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A small book: one chapter that computes, one that fails when it is told to."""
    # its kernels import this checkout: they start beside the folder tokensel below, which is no package
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "chapters").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights").write_text("1")
    (tmp_path / "tokensel").mkdir()
    (tmp_path / "tokensel" / "utils").mkdir()
    (tmp_path / "tokensel" / "utils" / "errors.py").write_text('"""Core."""\n\nx = 1\n')
    (tmp_path / "requirements.lock").write_text("torch==2.13.0\n")
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nchapters:\n"
        "- file: chapters/01_good\n- file: chapters/02_bad\n- file: status\n"
    )
    good = notebook(
        ("md", "# Good\n\n$x^2$ **run time** about 5 s"),
        ("code", "keep: float = 0.3  # kept\nmodel: str = 'm'"),
        ("code", "keep * 10"),
    )
    bad = notebook(
        ("md", "# Bad, **run time** about 2 min"),
        ("code", "sound: bool = True"),
        ("code", "assert sound, 'no sound'"),
    )
    nbformat.write(good, tmp_path / "chapters" / "01_good.ipynb")
    nbformat.write(bad, tmp_path / "chapters" / "02_bad.ipynb")
    return tmp_path


DRAWN = """from tokensel.book import open_chapter
open_chapter("03_drawn")
import matplotlib.pyplot as plt
plt.plot([0.1, 0.3], [40.0, 60.0], label="selector")
plt.show()
plt.bar([1], [5], label="bars")
plt.show()"""


def add_drawn(root: Path) -> None:
    """A third chapter, with two figures in one cell."""
    drawn = notebook(("md", "# Drawn **run time** about 5 s"), ("code", "keep: float = 0.3"), ("code", DRAWN))
    drawn.cells[2].metadata["mystnb"] = {"image": {"alt": "A line and a bar."}}
    nbformat.write(drawn, root / "chapters" / "03_drawn.ipynb")
    toc = root / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: chapters/03_drawn\n")


def result_of(root: Path, name: str) -> str:
    cells = nbformat.read(root / "_build" / "chapters" / f"{name}.ipynb", as_version=4).cells
    return cells[-1].outputs[0]["data"]["text/plain"]


# --- the chapters of this repository --------------------------------------------------------------------


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

    made = next(filter(makes, nodes))
    exec(ast.unparse(made), names | end)
    with pytest.raises(AssertionError):
        exec(ast.unparse(made), names | middle)


def test_every_module_has_its_place_on_the_api_page():
    page = library_page.page(ROOT / "tokensel")
    assert page.count(".. automodule:: tokensel.scorers.random\n   :members:") == 1
    assert page.count(".. automodule:: tokensel.scorers\n```") == 1
    assert (
        page.index("tokensel.model.selector")
        < page.index("tokensel.training.train")
        < page.index("tokensel.utils.errors")
    )
    assert page.count("automodule::") == len(list((ROOT / "tokensel").rglob("*.py"))) - 1  # without __main__


# --- running --------------------------------------------------------------------------------------------


def test_run_resume_and_parameters(clone, capsys):
    run.run_chapters(clone, ["01"], {})
    assert result_of(clone, "01_good") == "3.0"
    first = run.stamp(clone, clone / "chapters" / "01_good.ipynb")
    assert first["seconds"] > 0 and first["parameters"] == {}
    run.run_chapters(clone, ["01_good"], {})
    assert "up to date" in capsys.readouterr().out
    run.run_chapters(clone, ["chapters/01_good.ipynb"], {"keep": 0.5})
    assert result_of(clone, "01_good") == "5.0"
    assert "injected-parameters" in (clone / "_build" / "chapters" / "01_good.ipynb").read_text()


MEET = """import os, time
from pathlib import Path
mark = Path("_build")
(mark / f"{mine}.begun").touch()
until = time.monotonic() + 60
while not (mark / f"{other}.begun").exists():
    assert time.monotonic() < until, "alone"
    time.sleep(0.01)
(mark / f"{mine}.ended").touch()
int(os.environ["OMP_NUM_THREADS"])"""


def test_chapters_run_side_by_side_but_those_that_measure_time(clone, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stems = ("01_good", "02_bad", "03_timed")
    for mine, other in (stems[:2], stems[1::-1]):
        body = f"mine, other = {mine!r}, {other!r}\n{MEET}"
        promise = ("md", "**run time** about 5 s")
        nbformat.write(
            notebook(promise, ("code", "keep: float = 0.3"), ("code", body)),
            clone / "chapters" / f"{mine}.ipynb",
        )
    ended = "from pathlib import Path\nsorted(path.name for path in Path('_build').glob('*.ended'))"
    timed = notebook(("code", "keep: float = 0.3"), ("code", ended))
    timed.metadata["tokensel"] = {"measures_time": True}
    nbformat.write(timed, clone / "chapters" / "03_timed.ipynb")
    toc = clone / "_toc.yml"
    toc.write_text(
        "format: jb-book\nroot: index\nchapters:\n"
        + "".join(f"- file: chapters/{each}\n" for each in reversed(stems))
    )
    (clone / "_build").mkdir()
    run.run_chapters(clone, [], {}, jobs=2)
    assert result_of(clone, "01_good") == result_of(clone, "02_bad") == str(max(1, run.cores() // 2))
    assert result_of(clone, "03_timed") == "['01_good.ended', '02_bad.ended']"
    assert "OMP_NUM_THREADS" not in os.environ and list(clone.glob("*ipc*")) == []


def test_what_makes_a_chapter_stale(clone):
    path = clone / "chapters" / "01_good.ipynb"
    before = run.digest(clone, path, {})
    assert run.digest(clone, path, {"keep": 0.5}) != before
    for name, text in (
        ("tokensel/utils/errors.py", "x = 2\n"),
        ("requirements.lock", "torch==2.14.0\n"),
        ("data/weights", "2"),
    ):
        kept = (clone / name).read_text()
        (clone / name).write_text(text)
        assert run.digest(clone, path, {}) != before, name
        (clone / name).write_text(kept)
    book = nbformat.read(path, as_version=4)
    book.cells[0].source = "# Better"
    nbformat.write(book, path)
    assert run.digest(clone, path, {}) == before, "mended prose needs no new run"
    book.cells[2].source = "keep * 11"
    nbformat.write(book, path)
    assert run.digest(clone, path, {}) != before


def test_failed_cell_is_named_and_kept(clone):
    with pytest.raises(
        TokenselError, match=r"chapters/02_bad.ipynb, cell 4: AssertionError: no sound"
    ) as caught:
        run.run_chapters(clone, ["02"], {"sound": False})  # the given parameters have a cell of their own
    assert "\n" not in str(caught.value)
    kept = clone / "_build" / "chapters" / "02_bad.ipynb"
    assert "no sound" in kept.read_text()
    assert run.stamp(clone, clone / "chapters" / "02_bad.ipynb") == {}


def test_after_a_failure_beside_another_chapter_nothing_else_starts(clone):
    for name in ("01_good", "03_late"):
        shutil.copy(clone / "chapters" / "02_bad.ipynb", clone / "chapters" / f"{name}.ipynb")
    toc = clone / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: chapters/03_late\n")
    with pytest.raises(TokenselError, match=r"chapters/0[12]_\w+.ipynb, cell 4: AssertionError: no sound"):
        run.run_chapters(clone, [], {"sound": False}, jobs=2)
    assert not (clone / "_build" / "chapters" / "03_late.ipynb").exists()
    assert [run.stamp(clone, path) for path in run.chapter_paths(clone)] == [{}, {}, {}]


def test_unknown_names_are_refused_before_anything_runs(clone):
    with pytest.raises(TokenselError, match="01_good has no parameter 'kep': did you mean 'keep'"):
        run.run_chapters(clone, ["01"], {"kep": 0.3})
    with pytest.raises(TokenselError, match="02_bad has no parameter 'keep': it has sound"):
        run.run_chapters(clone, [], {"keep": 0.3})
    with pytest.raises(TokenselError, match="no chapter '07': there are 01_good, 02_bad"):
        run.run_chapters(clone, ["07"], {})
    assert not (clone / "_build").exists()


def test_root_is_found_from_below_and_missed_elsewhere(clone, tmp_path_factory):
    assert chapter.find_root(clone / "chapters") == clone
    with pytest.raises(TokenselError, match="clone of the book"):
        chapter.find_root(tmp_path_factory.mktemp("elsewhere"))


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


# --- pages ----------------------------------------------------------------------------------------------


def test_merge_takes_prose_from_the_source_and_outputs_from_the_run(clone):
    source = nbformat.read(clone / "chapters" / "01_good.ipynb", as_version=4)
    executed = nbformat.from_dict(json.loads(json.dumps(source)))
    executed.cells[2].outputs = [nbformat.v4.new_output("stream", text="3")]
    injected = nbformat.v4.new_code_cell(
        "# Parameters\nkeep = 0.5", metadata={"tags": ["injected-parameters"]}
    )
    executed.cells.insert(2, injected)
    source.cells[0].source = "# Mended"
    source.cells[2].metadata["tags"] = ["hide-input"]
    page = site.merge(source, executed)
    assert page.cells[2].metadata["tags"] == ["injected-parameters", "hide-cell"]
    assert page.cells[3].metadata["tags"] == ["hide-input"], "what is folded needs no new run either"
    assert [cell.source.split("\n")[0] for cell in page.cells] == [
        "# Mended", "keep: float = 0.3  # kept", "# Parameters", "keep * 10",
    ]  # fmt: skip
    assert page.cells[-1].outputs[0].text == "3"


def test_site_is_built_strictly_and_reads_without_a_network(clone):
    for name in ("_config.yml", "references.bib"):
        shutil.copy(ROOT / name, clone)
    for folder in ("_static", "_vendor"):
        shutil.copytree(ROOT / folder, clone / folder)
    (clone / "index.md").write_text("# A book\n\n{cite}`allakhverdov2025less`\n")
    (clone / "glossary.md").write_text("# Glossary\n")
    (clone / "references.md").write_text("# References\n\n```{bibliography}\n```\n")
    toc = clone / "_toc.yml"
    toc.write_text(toc.read_text() + "- file: references\n- file: api\n")
    add_drawn(clone)
    with pytest.raises(TokenselError, match="01_good has not been run"):
        site.build(clone)
    run.run_chapters(clone, [], {})
    index = site.build(clone)
    good = (index.parent / "chapters" / "01_good.html").read_text()
    assert "3.0" in good and "vendor/mathjax/tex-svg.js" in good
    assert (index.parent / "_static" / "vendor" / "mathjax" / "tex-svg.js").is_file()
    assert "torch" in (index.parent / "status.html").read_text()
    drawn = (index.parent / "chapters" / "03_drawn.html").read_text()
    for number, row in ((1, "selector,0.1,40"), (2, "bars,1,5")):
        name = f"_static/numbers/03_drawn-{number}.csv"
        assert f'href="../{name}"' in drawn
        assert row in (index.parent / name).read_text()
    offline.check(index.parent)

    (clone / "index.md").write_text("# A book\n\n[](nowhere.md)\n")
    with pytest.raises(TokenselError, match="jupyter-book"):
        site.build(clone)
    assert not index.exists(), "a failed build must not leave the old pages"


def test_a_figure_without_numbers_is_refused_and_an_explorer_lists_its_steps():
    page = notebook(("code", "x"), ("code", "y"), tags=("remove-output",))
    for cell in page.cells:
        cell.outputs = [nbformat.v4.new_output("display_data", {"image/png": "AA=="})]
    with pytest.raises(TokenselError, match="03_drawn, cell cell-1: a figure has no numbers"):
        numbers.link_figures(page, "03_drawn")
    step = {"kept": ["01"], "tokens": 7, "answer": "K"}
    data = {
        "keeps": [0.1],
        "methods": {"norm": "feature norm"},
        "examples": [{"name": "page", "steps": {"norm": [step]}}],
    }
    html = f'<div class="explorer">\n<script type="application/json">{json.dumps(data)}</script></div>'
    page.cells[1].outputs = [nbformat.v4.new_output("display_data", {"text/html": html})]
    assert numbers.link_figures(page, "03_drawn") == {
        "03_drawn-1.csv": "example,method,keep,tokens,answer\npage,feature norm,0.1,7,K\n"
    }
    assert 'href="../_static/numbers/03_drawn-1.csv"' in page.cells[1].outputs[1].data["text/html"]


def test_chapters_open_in_colab_where_the_repository_is_known():
    assert site.launch_links({"title": "x"}, {}) == {"title": "x"}
    config = site.launch_links(
        {"title": "x"}, {"GITHUB_REPOSITORY": "someone/book", "GITHUB_REF_NAME": "trunk"}
    )
    assert config["repository"] == {"url": "https://github.com/someone/book", "branch": "trunk"}
    assert "colab_url" in config["launch_buttons"] and config["title"] == "x"


def test_status_page_tells_versions_times_and_parameters(clone):
    run.run_chapters(clone, ["01"], {"keep": 0.5})
    page = status.page(clone)
    assert "`keep = 0.5`" in page and "| torch | 2." in page and "CPU core" in page
    assert "[](chapters/01_good.ipynb)" in page
    assert [run.stated_seconds(path) for path in run.chapter_paths(clone)] == [5, 120]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".html", '<script src="https://cdn.example/x.js"></script>'),
        (".html", '<link rel="stylesheet" href="//fonts.example/f.css">'),
        (".html", '<img alt="" srcset="a.png 1x, https://x.example/b.png 2x">'),
        (".html", '<div style="background: url(https://x.example/a.png)"></div>'),
        (".html", "<style>@import 'https://x.example/a.css';</style>"),
        (".html", '<script>fetch("https://x.example/data.json")</script>'),
        (".css", "a { background: url('//x.example/a.png') }"),
        (".js", 'import x from "https://x.example/x.js"'),
    ],
)
def test_remote_loads_are_found(suffix, text, tmp_path):
    (tmp_path / f"page{suffix}").write_text(text)
    with pytest.raises(TokenselError, match=r"loads .*example"):
        offline.check(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".html", '<a href="https://arxiv.org/abs/2503.16660">paper</a>'),
        (".html", '<link rel="canonical" href="https://book.example/">'),
        (".html", '<script src="_static/x.js"></script><img src="_images/a.png" alt="">'),
        (
            ".html",
            '<svg xmlns="http://www.w3.org/2000/svg"></svg><img src="data:image/png;base64,AA" alt="">',
        ),
        (".js", 'const help = "https://x.example/help"'),
        (".txt", '<script src="https://cdn.example/x.js"></script>'),
    ],
)
def test_links_and_local_files_pass(suffix, text, tmp_path):
    (tmp_path / f"page{suffix}").write_text(text)
    offline.check(tmp_path)
