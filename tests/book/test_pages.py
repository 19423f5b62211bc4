"""The pages of the book: built from source and run, complete, and readable without a network."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from small_book import add_drawn, notebook

from tokensel.book.site import build as site
from tokensel.book.site import numbers, offline, run, status
from tokensel.utils.errors import TokenselError

ROOT = Path(__file__).parents[2]


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
