"""Processors without their part for videos, which needs torchvision; images need Pillow alone."""

import inspect
from types import FunctionType
from typing import Any

from transformers import ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

__all__ = ["image_processor_only", "stock_processor"]


def image_processor_only(stock: type) -> type:
    """A subclass of a processor of transformers that has an image processor and a tokenizer, no more.

    It has the name of the stock class, so that the stock class reads what it saves.

    Args:
        stock: the processor class, such as ``Qwen2_5_VLProcessor``.
    """
    base: Any = stock

    class Processor(base):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        # a processor's own method may ask its part for videos, whatever the turns hold
        apply_chat_template = ProcessorMixin.apply_chat_template

    init: Any = stock.__init__
    parameters = inspect.signature(init).parameters
    if "video_processor" in parameters and parameters["video_processor"].default is inspect.Parameter.empty:
        # from_pretrained gives the attributes alone, and reads the names of other options off the code of
        # __init__: so it is the same code, with None for the missing part
        defaults = (None, *(init.__defaults__ or ()))
        Processor.__init__ = FunctionType(
            init.__code__, init.__globals__, init.__name__, defaults, init.__closure__
        )
    Processor.__name__ = Processor.__qualname__ = stock.__name__
    return Processor


def stock_processor(config: Any) -> type:
    """The processor class of transformers that belongs to a configuration."""
    mapping: Any = PROCESSOR_MAPPING
    return mapping[type(config)]
