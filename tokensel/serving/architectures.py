"""The classes of the plugin for vLLM, by the model_type of the configuration."""

from typing import NamedTuple

__all__ = ["ARCHITECTURES", "Architecture"]


class Architecture(NamedTuple):
    """A class of the plugin.

    Attributes:
        name: of the class, which is the architecture that vLLM is told.
        module: where it is.
        places: whether a visual token has a place in its image, which the engine has to be given.
    """

    name: str
    module: str
    places: bool = False


ARCHITECTURES = {
    "llava_next": Architecture("TokenselLlavaNext", "tokensel.serving.vllm_llava"),
    "llava_onevision": Architecture("TokenselLlavaOnevision", "tokensel.serving.vllm_llava"),
    "qwen2_5_vl": Architecture("TokenselQwen25Vl", "tokensel.serving.vllm_qwen", places=True),
}
