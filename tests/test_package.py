"""The package as users get it: a light import, a whole wheel, and few packages for the README's lines."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from PIL import Image
from skimage.data import astronaut

import tokensel

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "datasets", "pandas", "matplotlib", "numpy", "accelerate"}
# what only an extra brings
EXTRA = {"accelerate", "beartype", "datasets", "hypothesis", "matplotlib", "pandas", "rapidfuzz", "skimage"}


def python(code: str, cwd: Path, path: Path) -> str:
    """The output of a new Python process that sees ``path`` and nothing of the clone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git would give."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "tokensel", source / "tokensel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--wheel-dir", out, source], check=True, capture_output=True)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder into which the wheel is installed, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", target, wheel], check=True, capture_output=True)
    return target


def test_every_name_of_the_front_door_is_there():
    assert set(tokensel.__all__) <= set(dir(tokensel))
    for name in tokensel.__all__:
        value = getattr(tokensel, name)
        assert value.__name__ == name and value.__module__.startswith("tokensel.")
        assert vars(tokensel)[name] is value
    assert callable(tokensel.train) and callable(tokensel.evaluate)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        getattr(tokensel, "load")  # noqa: B009, a type checker would refuse tokensel.load


def test_import_loads_nothing_heavy(installed, tmp_path):
    code = "import sys, tokensel; print(tokensel.__file__, *sys.modules, sep='\\n')"
    file, *modules = python(code, tmp_path, installed).split()
    assert Path(file).is_relative_to(installed)
    assert not HEAVY & set(modules) and [m for m in modules if m.startswith("tokensel")] == ["tokensel"]


def test_the_wheel_holds_what_is_read_at_run_time(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert {"tokensel/py.typed", "tokensel/book/explorer/explorer.js"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tokensel").rglob("*.py")}
    assert modules <= names and f"Version: {tokensel.__version__}\n" in text
    assert not [name for name in names if name.startswith(("tests/", "chapters/", "data/"))]


def test_the_version_is_the_same_everywhere():
    for name, pattern in (
        ("CHANGELOG.md", r"## \[([\d.]+)\]"),
        ("CITATION.cff", r"version: ([\d.]+)\nauthors"),
    ):
        (version, *_) = re.findall(pattern, (ROOT / name).read_text())
        assert version == tokensel.__version__, name


def test_the_lines_of_the_readme_need_no_extra(installed, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(ROOT / "data" / "mini", tmp_path / "data" / "mini")
    Image.fromarray(astronaut()).save(tmp_path / "photo.jpg")
    # None makes every import of a package fail, as if it were not installed
    code = f"import sys\nsys.modules |= dict.fromkeys({sorted(EXTRA)})\n{block}"
    answer, file = python(
        f"{code}\nimport tokensel\nprint(tokensel.__file__)", tmp_path, installed
    ).splitlines()
    assert re.fullmatch(r"\d+ of \d+ visual tokens: .+", answer)
    assert Path(file).is_relative_to(installed)


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("rapidfuzz", "eval", "import tokensel.benchmarks.metrics as m; m.anls('a', ['b'])"),
        ("datasets", "eval", "from tokensel import evaluate"),
        ("datasets", "train", "from tokensel.data.image_sources import open_images as o; o('coco:train')"),
        ("matplotlib", "figures", "import tokensel.figures.curves"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(package, extra, use, installed, tmp_path):
    code = f"""
import sys
sys.modules[{package!r}] = None  # as if it were not installed
from tokensel import TokenselError
try:
    {use}
except TokenselError as error:
    print(error)
"""
    line = f"{package} is not installed: run `pip install 'tokensel[{extra}]'`\n"
    assert python(code, tmp_path, installed) == line


def test_the_library_imports_only_what_it_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = chain(project["dependencies"], *project["optional-dependencies"].values())
    known = {re.match(r"[\w-]+", line)[0] for line in declared}
    provider = {"PIL": "pillow", "skimage": "scikit-image"}
    provider |= {"tokenizers": "transformers", "traitlets": "ipywidgets", "yaml": "pyyaml"}
    provider |= {"cycler": "matplotlib", "lmms_eval": "lmms-eval", "IPython": "ipykernel"}
    for path in (ROOT / "tokensel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for package in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                assert provider.get(package, package) in known | {"tokensel"}, f"{path}: {package}"
