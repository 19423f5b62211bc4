"""What identifies code: the same under every Python, changed by what it does and by nothing else."""

import shutil
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.utils.provenance import package_versions
from tokensel.utils.source import PACKAGE, code_digest, reached_modules, syntax_digest

SOURCE = (Path(__file__).parent / "every_syntax.txt").read_text(encoding="utf-8")


def test_the_digest_does_not_depend_on_the_version_of_python():
    """Computed once with Python 3.11.7, 3.12.1 and 3.13.0, which agreed; ``ast.dump`` gives three digests."""
    assert syntax_digest(SOURCE) == "6d8bb6578d7fe88f"


@given(st.sampled_from(["# why", "", "    # deeper"]), st.integers(0, SOURCE.count("\n")))
@settings(max_examples=30, deadline=None)
def test_comments_and_blank_lines_do_not_count(line, place):
    lines = SOURCE.splitlines()
    lines.insert(place, line)
    assert syntax_digest("\n".join(lines)) == syntax_digest(SOURCE)


def test_docstrings_and_layout_do_not_count_but_meaning_does():
    source = 'def f(x):\n    """Old."""\n    return x + 1  # why\n'
    assert syntax_digest(source) == syntax_digest('def f(x):\n    """New."""\n\n    return (x + 1)\n')
    assert syntax_digest(source) != syntax_digest(source.replace("+ 1", "+ 2"))
    assert syntax_digest(source) != syntax_digest(source.replace("return", "y ="))
    assert syntax_digest("x = None") != syntax_digest("x = False")


def test_only_edits_of_reached_files_change_the_digest(tmp_path):
    package = tmp_path / "tokensel"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("book", "__pycache__"))
    modules = ("tokensel.methods", "tokensel.scorers.random")
    before = code_digest(*modules, package=package)
    assert before == code_digest(*modules)
    for number, (file, counts) in enumerate(
        {"scorers/diversity.py": False, "cost/count.py": False, "scorers/random.py": True}.items()
    ):
        other = tmp_path / str(number) / "tokensel"
        shutil.copytree(package, other)
        (other / file).write_text((other / file).read_text() + "\nx = 1\n")
        assert (code_digest(*modules, package=other) != before) == counts, file


def test_packages_pass_names_on_from_the_file_that_defines_them():
    reached = reached_modules(["tokensel.scorers.selector"])
    assert (
        "tokensel.model.selector" in reached and not {"tokensel.scorers", "tokensel.utils.errors"} & reached
    )


def test_a_package_that_is_not_installed_has_no_version():
    assert package_versions(["no-such-package-here"]) == {"no-such-package-here": None}
