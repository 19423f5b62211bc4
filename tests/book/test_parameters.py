"""What a chapter is given is what it takes: names, types, paths, and the files that lie behind them."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensel.book.site import inputs, parameters, run
from tokensel.utils.errors import TokenselError

ROOT = Path(__file__).parents[2]
CELL = """\
model: str = "data/mini/llava-next"  # a folder
suite: str = "tokensel.book.mini.suite"
keep: float = 0.3
n: int = 20
live: bool = True
keeps: list = [0.1, 0.3]
methods: list = ["full", "selector"]
anything: list = []
limit: int | None = None
"""
KNOWN = parameters.declared(CELL)
PAPERMILL = "# Parameters\n"


def test_parameters_are_read_as_python_or_text():
    assert parameters.parse_parameters(["keep=0.3", "model=a/b=c", "keeps=[0.1, 0.5]", "name="]) == {
        "keep": 0.3, "model": "a/b=c", "keeps": [0.1, 0.5], "name": "",
    }  # fmt: skip
    with pytest.raises(TokenselError, match="NAME=VALUE"):
        parameters.parse_parameters(["keep"])


# --- types --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "methods=full,selector",
            """methods = 'full,selector' is not a list; give -p "methods=['full', 'selector']""",
        ),
        ("keeps=0.3", 'keeps = 0.3 is not a list; give -p "keeps=[0.3]" or, to papermill, -y "keeps: [0.3]"'),
        ("keeps=['0.3']", "'0.3' in keeps is not a number; give "),
        ("keeps=[True]", "True in keeps is not a number; give "),
        ("methods=[0.3]", "0.3 in methods is not a text; give "),
        ("n=abc", "n = 'abc' is not a whole number; give -p n=20"),
        ("n=2.0", "n = 2.0 is not a whole number; give -p n=20"),
        ("n=True", "n = True is not a whole number; give -p n=20"),
        ("keep=0,3", "keep = (0, 3) is not a number; give -p keep=0.3"),
        ("keep=None", "keep = None is not a number; give -p keep=0.3"),
        ("live=1", "live = 1 is not True or False; give -p live=True"),
        ("model=3", 'model = 3 is not a text; give -p "model=data/mini/llava-next"'),
        ("limit=many", "limit = 'many' is not a whole number or None; give -p limit=None"),
        ("kep=0.3", "has no parameter 'kep': did you mean 'keep'"),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_how_to_write_it(pair, message):
    given_values = parameters.parse_parameters([pair])
    with pytest.raises(TokenselError) as caught:
        parameters.check("06_x", KNOWN, given_values)
    assert str(caught.value).startswith("06_x") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pair",
    ["keep=1", "keeps=[1, 0.5]", "limit=3", "limit=None", "anything=['a', 2]", "methods=[]", "model=a"],
)
def test_what_fits_passes(pair):
    parameters.check("06_x", KNOWN, parameters.parse_parameters([pair]))


SCALARS = {
    "bool": st.booleans(),
    "int": st.integers(),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "str": st.text(max_size=9),
}
VALUES = {**SCALARS, "list": st.lists(st.one_of(*SCALARS.values()), max_size=3), "None": st.none()}
FITS = {(kind, kind) for kind in VALUES} | {("float", "int")}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_passes_if_and_only_if_its_type_is_declared(data):
    wanted = data.draw(st.sampled_from(sorted(SCALARS)))
    optional = data.draw(st.booleans())
    kind = data.draw(st.sampled_from(sorted(VALUES)))
    value = data.draw(VALUES[kind])
    default = data.draw(SCALARS[wanted])
    known = parameters.declared(f"x: {wanted}{' | None' if optional else ''} = {default!r}")
    fits = (wanted, kind) in FITS or (optional and kind == "None")
    if fits:
        parameters.check("01_x", known, {"x": value})
    else:
        with pytest.raises(TokenselError, match=r"^01_x: x = "):
            parameters.check("01_x", known, {"x": value})


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_items_of_a_list_are_compared_with_those_of_the_default(data):
    wanted, kind = (data.draw(st.sampled_from(sorted(SCALARS))) for _ in range(2))
    default = data.draw(st.lists(SCALARS[wanted], min_size=1, max_size=3))
    value = data.draw(st.lists(SCALARS[kind], min_size=1, max_size=3))
    known = parameters.declared(f"x: list = {default!r}")
    if (wanted, kind) in FITS:
        parameters.check("01_x", known, {"x": value})
    else:
        with pytest.raises(TokenselError, match=r"^01_x: .* in x is not "):
            parameters.check("01_x", known, {"x": value})


def test_every_parameter_of_every_chapter_has_a_type_that_its_default_fits():
    for path in run.chapter_paths(ROOT):
        known = parameters.declared(parameters.parameters_cell(path))
        assert all(parameter.kinds for parameter in known.values()), path
        parameters.check(path.stem, known, {name: parameter.default for name, parameter in known.items()})


# --- what a kernel was given -------------------------------------------------------------------------------


def test_the_last_run_of_a_cell_counts():
    setup = "import os\nopen_chapter('x')"
    assert parameters.given_in(["", CELL, setup]) == ({}, {})
    known, values = parameters.given_in(["", CELL, PAPERMILL + "kepe = 0.2", setup])
    assert known == KNOWN and values == {"kepe": 0.2}
    mended = ["", CELL, PAPERMILL + "kepe = 0.2", setup, PAPERMILL + "keep = 0.2", setup]
    assert parameters.given_in(mended) == (KNOWN, {"keep": 0.2})
    spoiled = ["", CELL, PAPERMILL + "keep = 0.2", setup, PAPERMILL + "kepe = 0.2", setup]
    assert parameters.given_in(spoiled) == (KNOWN, {"kepe": 0.2})
    taken_back = ["", CELL, PAPERMILL + "kepe = 0.2", setup, CELL, setup]
    assert parameters.given_in(taken_back) == ({}, {})
    assert parameters.given_in(["%matplotlib inline", CELL, PAPERMILL + "keep = float('inf')\n"])[1] == {
        "keep": float("inf")
    }


IN_KERNEL = f"""
import json, os, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell({CELL!r}, store_history=True)
shell.run_cell("# Parameters\\n" + sys.argv[1], store_history=True)
from tokensel.book.site import chapter, numbers
chapter._quiet_libraries = lambda: None
setup = "from tokensel.book import open_chapter; root = open_chapter('06_x').root"
error = shell.run_cell(setup, store_history=True).error_in_exec
print(json.dumps([str(error), str(shell.user_ns.get("root")), shell.user_ns["model"], os.getcwd()]))
"""


def kernel(here: Path, home: Path, injected: str) -> list[str]:
    """Error, root, ``model`` and working directory after open_chapter in a kernel started in ``here``."""
    done = subprocess.run(
        [sys.executable, "-c", IN_KERNEL, injected], cwd=here, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(home), "MPLBACKEND": "Agg"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kernel_outside_any_clone_uses_that_of_the_package_and_its_own_paths(tmp_path):
    (tmp_path / "mine").mkdir()
    assert kernel(tmp_path, tmp_path, "model = 'mine'") == [
        "None",
        str(ROOT),
        str(tmp_path / "mine"),
        str(ROOT),
    ]
    assert kernel(ROOT / "chapters", tmp_path, "keep = 1 / 3")[0] == "None", (
        "computed in a cell written by hand"
    )
    error, *_ = kernel(ROOT / "chapters", tmp_path, "keep = '0.2'")
    assert error == "06_x: keep = '0.2' is not a number; give -p keep=0.3"


# --- paths and what lies behind them -----------------------------------------------------------------------


def test_paths_are_seen_from_where_the_user_stands(tmp_path):
    root, here = tmp_path / "clone", tmp_path / "clone" / "chapters"
    here.mkdir(parents=True)
    (root / "data").mkdir()
    (root / "data" / "m").touch()
    (here / "test").touch()
    (tmp_path / "S").mkdir()
    (tmp_path / "S" / "a.json").touch()

    def seen(value, name="model", here=here):
        return parameters.from_here(KNOWN, {name: value}, here, root)[name]

    assert seen("../data/m") == "data/m"
    assert seen("../../S") == str(tmp_path / "S")
    assert seen("../../S/*.json") == str(tmp_path / "S" / "*.json")
    assert seen("S", here=tmp_path) == str(tmp_path / "S")
    for value in ("data/m", "someone/model", str(tmp_path / "S"), ""):
        assert seen(value) == value, "from the root, on the hub, absolute, nothing"
    assert seen("test", name="suite") == "test", "no path is wanted there"


def chapter_in(root: Path) -> Path:
    (root / "chapters").mkdir(parents=True)
    (root / "requirements.lock").touch()
    cell = nbformat.v4.new_code_cell(CELL, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), root / "chapters" / "05_x.ipynb")
    return root / "chapters" / "05_x.ipynb"


def test_what_lies_behind_a_parameter_makes_a_chapter_stale(tmp_path, monkeypatch):
    root, folder = tmp_path / "clone", tmp_path / "S"
    path = chapter_in(root)
    (folder / "deep").mkdir(parents=True)
    weights, module = folder / "deep" / "model.safetensors", tmp_path / "elsewhere" / "my_suite.py"
    module.parent.mkdir()
    monkeypatch.syspath_prepend(module.parent)
    for file in (weights, module):
        file.write_text("1")
    for values, file in (
        ({"model": str(folder)}, weights),
        ({"model": str(weights)}, weights),
        ({"model": f"{folder}/*/*.safetensors"}, weights),
        ({"suite": "my_suite"}, module),
    ):
        before = inputs.digest(root, path, values)
        assert inputs.digest(root, path, values) == before
        file.write_text(file.read_text() + "2")
        assert inputs.digest(root, path, values) != before, values
    assert (
        inputs.behind(root, KNOWN, {"suite": "no.such.module", "model": "someone/model", "keep": 0.3}) == []
    )


def test_a_large_file_is_known_by_size_and_time(tmp_path, monkeypatch):
    path, file = chapter_in(tmp_path / "clone"), tmp_path / "weights"
    monkeypatch.setattr(inputs, "WHOLE", 3)
    file.write_text("1234")
    before = inputs.digest(tmp_path / "clone", path, {"model": str(file)})
    file.write_text("12345")
    assert inputs.digest(tmp_path / "clone", path, {"model": str(file)}) != before
