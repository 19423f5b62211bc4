"""Run a frozen vision tower of transformers: the features of one layer, and what its CLS token attends to.

The tower is shared: with the language model whose tower it is, and between threads. So nothing here changes
it. Each call runs a *view* of the tower: shallow copies of the few modules on the way to its layers, which
share every weight and end after the last layer that is read.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.utils.errors import TokenselError


def encoder_layers(tower: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The Transformer layers of a vision tower, whose outputs are its ``hidden_states[1:]``.

    Returns:
        The path of the ``ModuleList`` that holds them inside the tower, and the list.

    Raises:
        TokenselError: the layers are not in one list.
    """
    count = tower.config.num_hidden_layers
    lists = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise TokenselError(
            f"no single list of {count} layers in a {type(tower).__name__}: give a CLIP or SigLIP tower"
        )
    return lists[0]


def module_view(module: nn.Module, changes: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """A shallow copy of ``module`` that shares its weights; hooks and submodules can be changed in it alone.

    Args:
        module: stays as it is.
        changes: submodules that are others in the copy, by their path such as ``"encoder.layers"``.
    """
    view = copy.copy(module)
    view._modules = dict(module._modules)
    view._forward_hooks = module._forward_hooks.copy()
    # accelerate spreads models over devices by a forward of their own per module, bound to that module
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            vars(view)[name] = MethodType(value.__func__, view)
        elif isinstance(value, partial) and value.args and value.args[0] is module:
            vars(view)[name] = partial(value.func, view, *value.args[1:], **value.keywords)
    below: dict[str, dict[str, nn.Module]] = {}
    for path, change in (changes or {}).items():
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, {})[rest] = change
        else:
            view._modules[name] = change
    for name, inner in below.items():
        view._modules[name] = module_view(module.get_submodule(name), inner)
    return view


def _recorded(view: nn.Module, outputs: dict[str, Tensor], name: str) -> nn.Module:
    """``view`` with a hook that stores what it puts out as ``outputs[name]``."""

    def record(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> None:
        outputs[name] = out[0] if isinstance(out, tuple) else out

    view.register_forward_hook(record)
    return view


def cls_attention_row(
    query: Float[Tensor, "tiles 1 channels"], keys: Float[Tensor, "tiles all channels"], heads: int
) -> Float[Tensor, "tiles patches"]:
    """Attention of token 0 (CLS) to every other token, averaged over the heads.

    The row is softmaxed with CLS itself in it, as the tower does, so it sums to less than 1 without it.
    """
    tiles, count, channels = keys.shape
    # for one query, summing products reads the keys once in their layout; a matrix product would first
    # transpose them
    products = (query.float() * keys.float()).view(tiles, count, heads, channels // heads)
    weights = (products.sum(-1) * (channels // heads) ** -0.5).softmax(1)  # [tiles, all, heads]
    return weights.mean(-1)[:, 1:]


@torch.no_grad()
def run_tower(
    tower: PreTrainedModel,
    pixel_values: Float[Tensor, "tiles 3 height width"],
    layer: int | list[int],
    drop_cls: bool,
    interpolate: bool = False,
) -> tuple[Float[Tensor, "tiles tokens channels"], Callable[[], Float[Tensor, "tiles tokens"]] | None]:
    """Features of the tiles, chosen from the tower's hidden states exactly as LLaVA does before projecting.

    The tower's layers after the last one read are not run. The tower itself is not changed, not even while
    this runs, so several threads may share one.

    Args:
        tower: a ``CLIPVisionModel``, ``SiglipVisionModel`` or the like.
        pixel_values: normalised pixels, on the tower's device.
        layer: index into ``hidden_states``: 1 for the first layer, -1 for the last, before any final norm.
            The channels of several layers are concatenated, and the CLS attention is that of the last one.
        drop_cls: the tower's token 0 is a CLS token: leave it out, and return its attention. It is computed
            from its query and the keys of the tower's own run, so the tower need not run eager attention.
        interpolate: resample the position embeddings to the size of ``pixel_values``.

    Returns: The features, and a function that computes the CLS attention of the same layer (``None`` where
        there is no CLS token): most callers do not need it, so it is computed only when it is called.

    Raises:
        TokenselError: the tower has no such layer, or is of a kind unknown here.
    """
    wanted = [layer] if isinstance(layer, int) else list(layer)
    path, layers = encoder_layers(tower)
    for index in wanted:
        if index == 0 or not -len(layers) <= index <= len(layers):
            raise TokenselError(
                f"feature layer {index} does not exist: the vision tower has layers 1 to {len(layers)}, "
                f"or -1 to -{len(layers)} from the end"
            )
    numbers = [index % (len(layers) + 1) for index in wanted]  # 1 for the first layer
    outputs: dict[str, Tensor] = {}
    # hidden_states[i] is the output of layer i - 1 of the list; recording only the layers that are read needs
    # less memory than asking the tower for all hidden states
    run = list(layers)[: max(numbers)]
    for number in set(numbers):
        changes = {}
        if drop_cls and number == numbers[-1]:
            attention = run[number - 1].get_submodule("self_attn")
            changes = {
                f"self_attn.{name}": _recorded(module_view(attention.get_submodule(name)), outputs, name)
                for name in ("q_proj", "k_proj")
            }
        run[number - 1] = _recorded(module_view(run[number - 1], changes), outputs, f"layer {number}")
    view = module_view(tower, {path: nn.ModuleList(run)})
    options = {"interpolate_pos_encoding": True} if interpolate else {}
    # where the configuration asks for them, transformers would leave hooks on the shared layers
    view(pixel_values, output_hidden_states=False, output_attentions=False, **options)
    tokens = torch.cat([outputs[f"layer {number}"] for number in numbers], dim=-1)
    if not drop_cls:
        return tokens, None
    heads = tower.config.num_attention_heads
    # a copy of the one query, so that the memory of the others is freed
    query, keys = outputs["q_proj"][:, :1].clone(), outputs["k_proj"]
    return tokens[:, 1:], lambda: cls_attention_row(query, keys, heads)
