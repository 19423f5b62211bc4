"""Run a frozen vision tower of transformers: the features of one layer, and what its CLS token attends to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokensel.utils.errors import TokenselError


def encoder_layers(tower: nn.Module) -> tuple[nn.Module, str]:
    """Where the Transformer layers of a vision tower are, whose outputs are its ``hidden_states[1:]``.

    Returns:
        The module that holds them in one ``ModuleList``, and the name by which it does.

    Raises:
        TokenselError: they are not to be found as one list.
    """
    count = tower.config.num_hidden_layers
    lists = [
        (parent, name)
        for parent in tower.modules()
        for name, module in parent.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        raise TokenselError(
            f"no single list of {count} layers in a {type(tower).__name__}: give a CLIP or SigLIP tower"
        )
    return lists[0]


@contextmanager
def _only(parent: nn.Module, name: str, count: int) -> Iterator[None]:
    """While this lasts, ``parent`` has only the first ``count`` of its layers: nobody reads what the others make."""
    layers = getattr(parent, name)
    setattr(parent, name, layers[:count])
    try:
        yield
    finally:
        setattr(parent, name, layers)


@contextmanager
def _listen(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what each of the named modules puts out while the tower runs."""
    heard: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, _args: tuple, out: Tensor | tuple) -> None:
            heard[name] = out[0] if isinstance(out, tuple) else out

        return listen

    handles = [module.register_forward_hook(listener(name)) for name, module in modules.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def cls_row(
    query: Float[Tensor, "tiles 1 channels"], keys: Float[Tensor, "tiles all channels"], heads: int
) -> Float[Tensor, "tiles patches"]:
    """Attention of token 0 (CLS) to every other token, averaged over the heads.

    The row is softmaxed with CLS itself in it, as the tower does, so it sums to less than 1 without it.
    """
    tiles, count, channels = keys.shape
    # one query: summing products reads the keys once as they lie, where a matrix product would turn them round first
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

    The tower's layers after the last one wanted are not run.

    Args:
        tower: a ``CLIPVisionModel``, ``SiglipVisionModel`` or the like.
        pixel_values: normalised pixels.
        layer: index into ``hidden_states``: 1 for the first layer, -1 for the last, before any final norm.
            Of a list the layers are concatenated along the channels, and the CLS attention is the last one's.
        drop_cls: the tower's token 0 is a CLS token: leave it out, and return its attention. Its query and all
            keys are listened to as the tower computes them, so the tower need not run eager attention.
        interpolate: resample the position embeddings to the size of ``pixel_values``.

    Returns:
        The features, and a function that computes the CLS attention of the same layer (``None`` where there is no
        CLS token): most callers do not need it, so it is computed only when it is called.

    Raises:
        TokenselError: the tower has no such layer, or is of a kind unknown here.
    """
    wanted = [layer] if isinstance(layer, int) else list(layer)
    parent, name = encoder_layers(tower)
    encoder = getattr(parent, name)
    for index in wanted:
        if index == 0 or not -len(encoder) <= index <= len(encoder):
            raise TokenselError(
                f"feature layer {index} does not exist: the vision tower has layers 1 to {len(encoder)}, "
                f"or -1 to -{len(encoder)} from the end"
            )
    # hidden_states[i] is what layer i - 1 puts out; listening for it spares the memory of all the others
    modules = {f"layer {i}": encoder[i - 1 if i > 0 else i] for i in wanted}
    attention = modules[f"layer {wanted[-1]}"].self_attn
    if drop_cls:
        modules |= {"queries": attention.q_proj, "keys": attention.k_proj}
    options = {"interpolate_pos_encoding": True} if interpolate else {}
    last = max(index % (len(encoder) + 1) for index in wanted)
    with _listen(modules) as heard, _only(parent, name, last):
        tower(pixel_values, **options)
    tokens = torch.cat([heard[f"layer {i}"] for i in wanted], dim=-1)
    if not drop_cls:
        return tokens, None
    query, keys = heard["queries"][:, :1].clone(), heard["keys"]  # a copy, so that the other queries are freed
    return tokens[:, 1:], lambda: cls_row(query, keys, attention.num_heads)
