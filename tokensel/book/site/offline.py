"""Check that built pages need no network, by everything that a browser would fetch on its own."""

import re
from html.parser import HTMLParser
from pathlib import Path

from tokensel.utils.errors import TokenselError

# attributes that make a browser fetch something when the page opens; a[href] waits for a click
LOADING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
QUIET_LINKS = {"alternate", "author", "canonical", "help", "index", "license", "next", "prev", "search"}
REMOTE = re.compile(r"^\s*(?:https?:|wss?:|//)", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
# a call in a script that fetches at once, with the address written in it
IN_SCRIPT = re.compile(
    r"""(?:\bfetch\(|\bimport\(|\bimportScripts\(|\.src\s*=|\bfrom\s|\bimport\s)\s*["'`]((?:https?:)?//[^"'`\s]+)"""
)


class _Page(HTMLParser):
    """Collects the remote addresses that a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("script", "style") else ""
        if tag == "link" and set(values.get("rel", "").lower().split()) & QUIET_LINKS:
            return
        for name in LOADING.get(tag, ()):
            addresses = values.get(name, "").split(",") if name == "srcset" else [values.get(name, "")]
            self.found += [address.strip() for address in addresses if REMOTE.match(address)]
        self.found += IN_STYLE.findall(values.get("style", ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.found += IN_STYLE.findall(data)
        elif self.inside == "script":
            self.found += IN_SCRIPT.findall(data)


def remote_loads(text: str, suffix: str) -> list[str]:
    """Remote addresses that a file would make a browser fetch without a click.

    Args:
        text: content of the file.
        suffix: ``.html``, ``.css`` or ``.js``; another kind loads nothing.
    """
    if suffix == ".css":
        return IN_STYLE.findall(text)
    if suffix == ".js":
        return IN_SCRIPT.findall(text)
    if suffix != ".html":
        return []
    page = _Page()
    page.feed(text)
    return page.found


def check(folder: Path) -> None:
    """Check all pages, style sheets and scripts below ``folder``.

    Raises:
        TokenselError: the first file that would load something from a network, with the address.
    """
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".html", ".css", ".js")):
        if remote := remote_loads(file.read_text(encoding="utf-8", errors="replace"), file.suffix):
            raise TokenselError(
                f"{file.relative_to(folder)} loads {remote[0]}: the book must work without a network; "
                "put the file into _vendor/ or leave it out"
            )
