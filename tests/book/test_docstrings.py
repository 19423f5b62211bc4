"""Sphinx can read every docstring: it makes the library's page of them, and a warning there is an error."""

import ast
from pathlib import Path

import pytest
from docutils import nodes
from docutils.core import publish_doctree
from docutils.parsers.rst import roles
from sphinx.ext.napoleon import Config, GoogleDocstring

PACKAGE = Path(__file__).parents[2] / "tokensel"
ROLES = ("attr", "class", "data", "doc", "func", "meth", "mod", "ref")


@pytest.fixture(autouse=True, scope="module")
def _roles_of_sphinx():
    def role(name, rawtext, text, lineno, inliner, options=None, content=()):
        return [nodes.literal(rawtext, text)], []

    for name in ROLES:
        roles.register_local_role(name, role)
    yield
    for name in ROLES:
        roles._roles.pop(name, None)


def docstrings(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield getattr(node, "name", path.stem), text


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_docstrings_are_clean_restructured_text(path):
    faults = []
    for name, text in docstrings(path):
        lines = GoogleDocstring(text, Config(napoleon_use_ivar=True), what="function").lines()
        tree = publish_doctree(
            "\n".join(lines), settings_overrides={"report_level": 5, "halt_level": 6, "_disable_config": True}
        )
        messages = [message.astext() for message in tree.findall(nodes.system_message)]
        faults += [f"{name}: {message}" for message in messages]
    assert faults == []
