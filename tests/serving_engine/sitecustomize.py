"""Runs at the start of every process of the engine under test: declares two operators of torchvision.

The build of torchvision that a package index offers may belong to a build of torch with CUDA. Beside the CPU
build of torch it cannot load its compiled operators, and its import ends where it describes two of them. The
engine needs none of them, only functions for images. With a matching pair of builds this does nothing.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import version


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to be imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")  # the declarations end with it
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def cpu_build(package: str) -> bool:
    return version(package).endswith("+cpu")


if cpu_build("torch") and not cpu_build("torchvision"):
    FINDER = _BeforeTorchvision()
    sys.meta_path.insert(0, FINDER)
