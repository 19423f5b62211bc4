"""tokensel: keep the visual tokens from which the others can be reconstructed.

>>> from tokensel import load_vlm, make_scorer, reduce_inputs
>>> vlm = load_vlm("llava-hf/llava-v1.6-mistral-7b-hf")
>>> selector = make_scorer("selector", selector="folder or Hub id")
>>> inputs = vlm.inputs([image], [vlm.prompt("What is the total?")])
>>> prompt = reduce_inputs(vlm.model, inputs, selector, keep=0.3)
>>> vlm.generate(prompt)
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "TokenReconstructor",
    "TokenSelector",
    "TokenselError",
    "TrainConfig",
    "VisionEncoder",
    "evaluate",
    "load_vlm",
    "make_schedule",
    "make_scorer",
    "reduce_inputs",
    "train",
]

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ imports each name when it is used
    from tokensel.benchmarks.runner import evaluate
    from tokensel.data.encoders import VisionEncoder
    from tokensel.model.reconstructor import TokenReconstructor
    from tokensel.model.selector import TokenSelector
    from tokensel.schedules import make_schedule
    from tokensel.scorers import make_scorer
    from tokensel.training.config import TrainConfig
    from tokensel.training.train import train
    from tokensel.utils.errors import TokenselError
    from tokensel.vlm import load_vlm, reduce_inputs

_MODULES = {
    "TokenReconstructor": "tokensel.model.reconstructor",
    "TokenSelector": "tokensel.model.selector",
    "TokenselError": "tokensel.utils.errors",
    "TrainConfig": "tokensel.training.config",
    "VisionEncoder": "tokensel.data.encoders",
    "evaluate": "tokensel.benchmarks.runner",
    "load_vlm": "tokensel.vlm",
    "make_schedule": "tokensel.schedules",
    "make_scorer": "tokensel.scorers",
    "reduce_inputs": "tokensel.vlm",
    "train": "tokensel.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tokensel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # so that the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
