"""The seam with LLaVA-NeXT: no fork, no subclass, no copied forward."""

from tokensel.vlm.choose import Choices
from tokensel.vlm.downsample import downsample
from tokensel.vlm.encode import Encoded, encode
from tokensel.vlm.load import Vlm, load_vlm
from tokensel.vlm.reduce import Reduced, reduce, reduce_inputs

__all__ = [
    "Choices",
    "Encoded",
    "Reduced",
    "Vlm",
    "downsample",
    "encode",
    "load_vlm",
    "reduce",
    "reduce_inputs",
]
