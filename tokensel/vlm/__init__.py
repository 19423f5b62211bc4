"""The integration with vision-language models of transformers: no fork, no subclass, no copied forward."""

from tokensel.vlm.choose import Choices
from tokensel.vlm.downsample import downsample, pool
from tokensel.vlm.encode import Encoded, encode
from tokensel.vlm.family_encoder import FamilyEncoder, load_encoder
from tokensel.vlm.generate import GenerationOutput
from tokensel.vlm.load import Vlm, load_vlm
from tokensel.vlm.native import count_tokens, native
from tokensel.vlm.reduce import Reduced, reduce, reduce_inputs

__all__ = [
    "Choices",
    "Encoded",
    "FamilyEncoder",
    "GenerationOutput",
    "Reduced",
    "Vlm",
    "count_tokens",
    "downsample",
    "encode",
    "load_encoder",
    "load_vlm",
    "native",
    "pool",
    "reduce",
    "reduce_inputs",
]
