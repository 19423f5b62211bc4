"""The page of the library, from its docstrings: every module of the package, in a reader's order."""

import re
from pathlib import Path

# autodoc imports what it describes, and the book is built without the engine that these extend
ENGINE = re.compile(r"^(from|import) vllm\b", re.MULTILINE)
# a module belongs to the first group that names its package; a package that no group names is a tool
GROUPS = {
    "Selector and reconstructor": ("model",),
    "Images, encoders, features": ("data",),
    "Training": ("training",),
    "Choosing tokens": ("scorers", "budget", "methods"),
    "Inside LLaVA": ("vlm", "schedules"),
    "Serving": ("serving",),
    "Evaluation": ("benchmarks",),
    "Cost": ("cost", "profiling"),
    "Figures": ("figures",),
    "The book": ("book",),
    "Tools": (),
}


def modules(package: Path) -> list[str]:
    """Dotted names of the modules below ``package`` that the page describes, packages first."""
    names = []
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        if parts[-1] != "__main__" and not ENGINE.search(path.read_text(encoding="utf-8")):
            names.append(".".join(parts).removesuffix(".__init__"))
    return sorted(names)


def group_of(module: str) -> str:
    """The heading under which a module stands."""
    inner = module.partition(".")[2]
    for title, names in GROUPS.items():
        if inner.split(".")[0] in names:
            return title
    return "Tools"


def page(package: Path) -> str:
    """The page in MyST Markdown, to be filled by Sphinx's autodoc."""
    lines = [
        "# The library",
        "",
        "Everything that the chapters call. Signatures give the shapes: "
        '`Float[Tensor, "batch tokens channels"]` is a floating-point tensor with three named axes, and an '
        "axis of the same name has the same length throughout a signature. "
        "A mask is True where a token is kept.",
    ]
    every = modules(package)
    for title, names in GROUPS.items():
        members = [module for module in every if group_of(module) == title]
        order = {name: place for place, name in enumerate(names)}
        members.sort(key=lambda module: (order.get([*module.split("."), ""][1], len(order)), module))
        lines += ["", f"## {title}"]
        for module in members:
            # a package shows its purpose; what it exports is described where it is defined
            is_package = (package.parent / Path(*module.split("."))).is_dir()
            lines += ["", f"### {module}", "", "```{eval-rst}", f".. automodule:: {module}"]
            lines += [*([] if is_package else ["   :members:"]), "```"]
    return "\n".join(lines) + "\n"
