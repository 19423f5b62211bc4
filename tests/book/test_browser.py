"""The built book in a real browser without a network: complete pages, no errors, no scrolling sideways, axe.

Needs the book (`make book`) and a Chromium; `TOKENSEL_BROWSER=required` turns a missing one into a failure.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html") if "_static" not in page.parts)


def _missing() -> str:
    try:
        import axe_playwright_python.sync_playwright  # noqa: F401
    except ImportError as error:
        return f"no {error.name}: pip install -e '.[test]'"
    if BROWSER is None:
        return "no browser: install chromium, for instance by apt-get install chromium"
    return "" if PAGES else f"no pages in {SITE}: make book"


if reason := _missing():
    if os.environ.get("TOKENSEL_BROWSER") == "required":
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from tokensel.book.site import numbers, run
from tokensel.figures import style

QUIET = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
AXE = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"],
    # docutils marks references by a role that ARIA has since deprecated; axe reports that and misses items
    "rules": {name: {"enabled": False} for name in ("aria-deprecated-role", "aria-required-children")},
    "resultTypes": ["violations"],
}
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, chromium_sandbox=False, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a page of the book; ``trouble`` collects what went wrong meanwhile."""
    contexts = []

    def open_page(name: str, viewport: dict[str, int] = WIDE, **options):
        context = browser.new_context(viewport=viewport, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.trouble = []
        page.on(
            "console", lambda m: m.type in ("error", "warning") and page.trouble.append(f"{m.type}: {m.text}")
        )
        page.on("pageerror", lambda error: page.trouble.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda request: page.trouble.append(f"failed: {request.url}"))
        page.on(
            "request",
            lambda r: (
                urlsplit(r.url).scheme in ("file", "data", "blob") or page.trouble.append(f"asks for {r.url}")
            ),
        )
        file, _, query = name.partition("?")
        page.goto(f"{(SITE / file).as_uri()}?{query}", wait_until="load")
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page_opens_whole_without_a_network(name, visit):
    page = visit(name)
    assert page.locator("h1").count() >= 1
    math = page.locator(".math").count()
    page.wait_for_function("n => document.querySelectorAll('mjx-container').length >= n", arg=math)
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0, "a formula that cannot be read"
    broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
    assert page.trouble == [] and broken == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_phone(name, visit):
    page = visit(name, PHONE)
    page.wait_for_function(
        "n => document.querySelectorAll('mjx-container').length >= n", arg=page.locator(".math").count()
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.timeout(900)  # the page of the library is long: axe looks at it for minutes
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_page_passes_axe(name, theme, visit):
    page = visit(name, color_scheme=theme, reduced_motion="reduce")
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    # a button's colour fades from one theme's to the other's: half way it has no contrast to speak of
    page.evaluate("Promise.allSettled(document.getAnimations().map(each => each.finished))")
    results = Axe().run(page, options=AXE)
    assert results.violations_count == 0, results.generate_report()


def test_search_finds_without_a_network(visit):
    page = visit("search.html?q=hinge")
    page.locator("#search-results li a").first.wait_for()
    assert any("04_training" in link for link in _targets(page))
    assert page.trouble == []


def test_book_opens_from_a_server_and_is_small(browser):
    handler = functools.partial(QuietHandler, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}/"
        page, asked = browser.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        assert page.goto(home, wait_until="load").ok
        page.close()
        server.shutdown()
    assert asked and all(url.startswith((home, "data:")) for url in asked)
    assert sum(file.stat().st_size for file in SITE.rglob("*") if file.is_file()) <= 60e6


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves without a line for every request."""

    def log_message(self, *_) -> None:
        pass


def _targets(page) -> set[str]:
    return set(page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"))


def test_links_inside_the_book_arrive(visit):
    links = {name: _targets(visit(name)) for name in PAGES}
    anchors: dict[Path, set[str]] = {}
    astray = []
    for name, targets in links.items():
        for target in targets:
            address, fragment = urldefrag(target)
            if urlsplit(address).scheme != "file":
                continue
            file = Path(unquote(urlsplit(address).path))
            if not file.is_relative_to(SITE) or not file.is_file():
                astray.append(f"{name} -> {target}")
            elif fragment and file.suffix == ".html":
                if file not in anchors:
                    anchors[file] = set(
                        visit(str(file.relative_to(SITE))).evaluate(
                            "[...document.querySelectorAll('[id]')].map(e => e.id)"
                        )
                    )
                if unquote(fragment) not in anchors[file]:
                    astray.append(f"{name} -> {target}")
    assert astray == []


@pytest.mark.skipif(os.cpu_count() != 2, reason="the times that chapters state are for two cores")
def test_chapters_take_about_as_long_as_they_say():
    astray = {}
    for path in run.chapter_paths(ROOT):
        stated, took = run.stated_seconds(path), run.stamp(ROOT, path)["seconds"]
        if not stated / 2 <= took <= 2 * stated and abs(took - stated) > 15:
            astray[path.name] = f"stated {stated} s, took {took:.0f} s"
    assert astray == {}


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_has_its_numbers_one_click_away(name, visit):
    page = visit(name)
    # the still figure of an explorer shows one of the explorer's steps: one link serves both
    figures = page.locator(":is(.cell_output, figure) :is(img:not(.explorer img), .explorer)").count()
    links = page.locator("article :is(p.numbers a, figcaption a.download)")
    assert links.count() == figures
    for number in range(figures):
        file = Path(unquote(urlsplit(links.nth(number).evaluate("link => link.href")).path))
        assert file.is_relative_to(SITE) and numbers.has_numbers(file.read_text(encoding="utf-8")), file


WIDE_SCREEN = {"width": 1300, "height": 900}
FIGURES = ".bd-article :is(.cell_output, figure) img"
SMALLEST = 8.0  # points


def shown_type(figure) -> float:
    """The smallest type of a figure in points as the page shows it: the page scales wide images down.

    Type in a figure has at least ``style.LABEL`` points, which a test of the chapters holds.
    """
    scale = figure.evaluate("image => image.clientWidth / image.naturalWidth")
    return style.LABEL / 72 * style.DPI * scale * 72 / 96  # a CSS pixel is 1/96 inch


@pytest.mark.parametrize("name", PAGES)
def test_type_in_figures_is_large_enough_and_every_figure_is_described(name, visit):
    # without JavaScript the still figures of the explorers are shown, too
    figures = visit(name, WIDE_SCREEN, java_script_enabled=False).locator(FIGURES)
    for figure in figures.all():
        alt = figure.get_attribute("alt") or ""
        assert len(alt) > 60, f"no description: {alt}"
        assert shown_type(figure) >= SMALLEST, alt
    if (SITE / name).parent.name == "chapters":
        assert figures.count() >= 1


@pytest.mark.parametrize("name", PAGES)
def test_no_code_no_table_and_no_formula_scrolls_sideways(name, visit):
    page = visit(name, WIDE_SCREEN)
    page.wait_for_function(
        "n => document.querySelectorAll('mjx-container').length >= n", arg=page.locator(".math").count()
    )
    # what is folded has no width: open it first
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    astray = page.evaluate(
        """[...document.querySelectorAll(
            '.bd-article :is(pre, table, .cell_output, .highlight, div.math mjx-container)')]
        .filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0)
        .map(e => `${e.localName} ${e.scrollWidth} > ${e.clientWidth}: ${e.textContent.slice(0, 60)}`)"""
    )
    assert astray == []


@pytest.mark.parametrize("path", run.chapter_paths(ROOT), ids=lambda path: path.stem)
def test_what_cells_show_has_no_bare_marks_and_no_wrapped_code(path, visit):
    page = visit(f"chapters/{path.stem}.html")
    shown = page.locator(".bd-article .cell_output :is(p, li)").all_text_contents()
    assert not [text for text in shown if "| --" in text or "| \u2014" in text or text.count("$") >= 2]
    sources = page.locator(".bd-article .cell_output .text_html pre").all_text_contents()
    assert not [line for source in sources for line in source.splitlines() if len(line) > 88], "it wraps"
    tables = page.locator(".bd-article .cell_output table").all_text_contents()
    if "claims_table(" in path.read_text(encoding="utf-8"):
        assert any("the paper says" in text and "measured here" in text for text in tables)


EXPLORERS = [name for name in PAGES if 'class="explorer"' in (SITE / name).read_text(encoding="utf-8")]


def test_the_book_has_an_explorer():
    assert EXPLORERS


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorer_answers_to_keyboard_and_pointer(name, visit):
    page = visit(name)
    box = page.locator(".explorer[data-ready]").first
    controls = box.locator("select, input")
    status = box.locator(".explorer-status")
    drawn = "box => [...box.querySelectorAll('canvas')].map(canvas => canvas.toDataURL()).join()"
    controls.first.focus()
    for number in range(controls.count()):  # reached by Tab, each changed by a key
        control = controls.nth(number)
        assert control.evaluate("control => control === document.activeElement")
        before = (status.text_content(), box.evaluate(drawn))
        page.keyboard.press("ArrowDown" if control.evaluate("c => c.localName") == "select" else "ArrowRight")
        page.wait_for_function(
            "([s, text]) => s.textContent !== text", arg=[status.element_handle(), before[0]]
        )
        assert box.evaluate(drawn) != before[1]
        page.keyboard.press("Tab")
    slider = box.locator("input[type=range]")
    before = status.text_content()
    slider.click(position={"x": 2, "y": slider.bounding_box()["height"] / 2})
    page.wait_for_function("([s, text]) => s.textContent !== text", arg=[status.element_handle(), before])
    assert slider.input_value() == slider.get_attribute("min")
    assert not box.locator(".explorer-still").is_visible()
    assert page.trouble == []


@pytest.mark.parametrize("name", EXPLORERS)
def test_explorer_is_a_still_figure_without_javascript(name, visit):
    page = visit(name, java_script_enabled=False)
    still = page.locator(".explorer-still img").first
    assert still.is_visible() and len(still.get_attribute("alt")) > 60
    assert page.locator(".explorer :is(select, input)").count() == 0
