"""A device that stands in for a GPU: its tensors have values, and are nowhere but there.

PyTorch's "meta" device refuses what a GPU refuses, but has no values, so that no answer can be generated on
it. A tensor here wraps one in host memory and reports the device ``standin``. Like a CUDA tensor it refuses
to meet a host tensor in one operation (unless that is a single number, or an index) and to be read by
NumPy; ``.cpu()``, ``.item()`` and ``.tolist()`` fetch values.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.utils.backend_registration as registration
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

NAME = "standin"


class StandIn(torch.Tensor):
    """A tensor on the stand-in device; ``host`` has its values."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "StandIn":
        return torch.Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, device=DEVICE
        )

    def __init__(self, host: torch.Tensor):
        self.host = host

    def __repr__(self, **_: Any) -> str:
        return f"StandIn({self.host!r})"

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Sees the operations that create a tensor from none, such as ``torch.zeros``."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Makes tensors of Python numbers on the host first: PyTorch shows their way to the device to no mode."""

    def __torch_function__(self, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and device is not None:
            if isinstance(args[0], torch.Tensor):
                return args[0].to(**kwargs)
            numbers = tree_map(_number, args[0])
            return func(numbers, *args[1:], **kwargs | {"device": "cpu"}).to(device)
        return func(*args, **kwargs)


def _number(value: Any) -> Any:
    """The number that a tensor in a list holds, as PyTorch fetches it from a GPU."""
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """Within it, tensors and models can be on the device that it gives; inference mode is only no_grad.

    PyTorch refuses to wrap the tensors that inference mode makes.
    """
    with _Functions(), _Dispatch(), mock.patch.multiple(
        torch.inference_mode, __enter__=_enter_no_grad, __exit__=_exit_no_grad
    ):  # fmt: skip
        yield DEVICE


def _enter_no_grad(self: Any) -> None:
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)


def _exit_no_grad(self: Any, *_: Any) -> None:
    torch.set_grad_enabled(self.before)


COPIES = ("copy_", "_to_copy", "to", "set_")
# operations whose indices may be on the host while the indexed tensor is on a GPU
INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
# operations whose last argument may be a number on the host, besides those that PyTorch tags as pointwise
NUMBERS = ("masked_fill", "fill", "floor_divide")


_operations = 0


def count_operations() -> int:
    """How many operations this process has run on the device, tensors made or moved there included."""
    return _operations


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run one operation on the values, and put its result where a GPU would have it."""
    global _operations
    name = func.overloadpacket.__name__
    given = [*leaves_of(args), *leaves_of(tuple(kwargs.values()))]
    tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
    on_device = any(isinstance(leaf, StandIn) for leaf in tensors)
    devices = [leaf for leaf in given if isinstance(leaf, torch.device)]
    target = devices[0] if devices else None  # a place among the arguments is named only for the result
    if not on_device and target is None:
        return func(*args, **kwargs)
    if on_device and name not in COPIES:
        refuse_mixing(func, args, tensors)
    if (target.type == NAME if target else True) and any(isinstance(leaf, torch.Generator) for leaf in given):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    _operations += on_device or (target is not None and target.type == NAME)
    out = func(*change(to_host, args), **{key: change(to_host, value) for key, value in kwargs.items()})
    if target is not None:
        stays = target.type == NAME
    elif name == "copy_":
        stays = isinstance(args[0], StandIn)
    else:
        stays = on_device
    if not stays:
        return args[0] if name == "copy_" else out
    own = {
        id(leaf.host): leaf for leaf in tensors if isinstance(leaf, StandIn)
    }  # an operation may return its input

    def wrap(leaf: Any) -> Any:
        return own[id(leaf)] if id(leaf) in own else StandIn(leaf) if isinstance(leaf, torch.Tensor) else leaf

    wrapped = change(wrap, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if on_device else wrapped


def leaves_of(values: Any) -> Iterator[Any]:
    """What lists and tuples hold; PyTorch's own ``tree_leaves`` takes longer than most operations."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves_of(value)
        else:
            yield value


def change(function: Callable[[Any], Any], value: Any) -> Any:
    """Lists and tuples with each leaf replaced by ``function`` of it."""
    if type(value) in (list, tuple):
        return type(value)(change(function, part) for part in value)
    return function(value)


def to_host(leaf: Any) -> Any:
    """A tensor's values, and the host in place of the device; anything else as it is."""
    if isinstance(leaf, StandIn):
        return leaf.host
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def refuse_mixing(func: Any, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise where a host tensor meets one of the stand-in device, except where a GPU takes it.

    It takes an index, and a single number without dimensions in an operation that goes element by element.
    Neither a result nor a mask may be on the host.
    """
    name = func.overloadpacket.__name__
    allowed: list[Any] = []
    if name in INDEXED and isinstance(args[0], StandIn):
        allowed = [*args[1], *[value for value in args[2:3] if value.dim() == 0]]
    elif name.rstrip("_") in NUMBERS:
        allowed = [value for value in args[-1:] if isinstance(value, torch.Tensor) and value.dim() == 0]
    elif torch.Tag.pointwise in func.tags and not name.endswith("_"):
        allowed = [tensor for tensor in tensors if tensor.dim() == 0]
    elif torch.Tag.pointwise in func.tags:  # its result is its first argument
        allowed = [tensor for tensor in tensors if tensor.dim() == 0 and tensor is not args[0]]
    for tensor in tensors:
        if not isinstance(tensor, StandIn) and not any(tensor is one for one in allowed):
            found = f"{NAME}:0 and {tensor.device}"
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")


def _module() -> types.ModuleType:
    """What PyTorch asks of ``torch.standin``."""
    module = types.ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": lambda _: None,
        "get_device_name": lambda *_: NAME,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    return module


def register() -> torch.device:
    """Make PyTorch know the device's name; once in a process."""
    if not hasattr(torch, NAME):
        registration._setup_privateuseone_for_python_backend(NAME, backend_module=_module())
    return torch.device(NAME, 0)


DEVICE = register()

# autocast leaves every operation in its own precision there: without this, none is known for the device
_AUTOCAST = torch.library.Library("_", "IMPL")
_AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
