"""Every paper that a method of the library names has an entry among the book's references."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"arXiv[ :](\d{4}\.\d{4,5})")
METHODS = sorted(
    path
    for folder in ("scorers", "schedules", "model")
    for path in (ROOT / "tokensel" / folder).glob("*.py")
    if NUMBER.search(path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_methods_paper_is_among_the_references(path):
    listed = set(NUMBER.findall((ROOT / "references.bib").read_text(encoding="utf-8")))
    named = set(NUMBER.findall(path.read_text(encoding="utf-8")))
    assert named <= listed, f"{path.name} names {sorted(named - listed)}, which references.bib has not"


def test_entries_can_be_read_and_have_what_a_list_shows():
    pybtex = pytest.importorskip("pybtex.database")
    entries = pybtex.parse_file(str(ROOT / "references.bib")).entries
    assert len(METHODS) > 15 and len(entries) > 20
    for key, entry in entries.items():
        assert entry.fields.get("title") and entry.fields.get("year"), key
        assert entry.persons.get("author") or entry.fields.get("key"), key
        if "eprint" in entry.fields:
            assert entry.fields["eprint"] in entry.fields.get("note", entry.fields["eprint"]), key
