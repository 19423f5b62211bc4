"""The classes of the plugin for vLLM, by the model_type of the configuration."""

__all__ = ["ARCHITECTURES"]

ARCHITECTURES = {
    "llava_next": "TokenselLlavaNext",
    "llava_onevision": "TokenselLlavaOnevision",
}
