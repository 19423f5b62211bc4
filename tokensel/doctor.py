"""What would happen to one image in a model: its tokens, and which methods fit. Each method is tried."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from tokensel.data.images import as_image
from tokensel.methods import Batch, methods, prepare
from tokensel.schedules import (
    SCHEDULES,
    Schedule,
    cuts_at_depth,
    make_schedule,
    pruned,
    schedule_options,
)
from tokensel.schedules.decoder import decoder_of
from tokensel.scorers import scorer_class
from tokensel.utils.errors import TokenselError, check_keep
from tokensel.vlm.model import Vlm
from tokensel.vlm.reduce import Reduced, reduce

__all__ = ["before", "examine", "inside"]

QUESTION = "What is in the image?"
Verdicts = dict[str, str | None]  # by the name of a method: why it does not fit, None if it does


@torch.no_grad()
def examine(vlm: Vlm, image: Any = None, keep: float = 0.3) -> list[str]:
    """Lines of text on a model: family, attention, tokens of an image, positions, and methods.

    The vision tower runs once, the language model does not run: a method that chooses tokens is tried on the
    image, a schedule is placed in the model and removed.

    Args:
        vlm: the model.
        image: an image, see :func:`~tokensel.data.images.as_image`; by default a drawn grey ramp.
        keep: fraction of the visual tokens to keep, in (0, 1].

    Raises:
        TokenselError: an image that cannot be read, ``keep`` outside (0, 1], or a model without a chat
            template.
    """
    check_keep(keep)
    drawn = Image.linear_gradient("L").resize((640, 480)).convert("RGB")
    picture = drawn if image is None else as_image(image)
    batch = Batch(vlm, [picture], [QUESTION])
    encoded, config = batch.seeing, vlm.model.config
    family, full = encoded.family, reduce(encoded)
    fewer = prepare(batch, "uniform", keep)
    axes = encoded.positions
    vision = getattr(config, "vision_config", config)
    text = config.get_text_config()
    kind = "" if image is not None else " (drawn)"
    lines = [
        f"model: {vlm.name}, {family.name} ({config.model_type}), {vlm.model.dtype} on {vlm.model.device}",
        f"way: {family.way}",
        f"attention: {text._attn_implementation} in the {text.model_type}, {vision._attn_implementation} in "
        f"the {vision.model_type}",
        f"image: {picture.width} x {picture.height} pixels{kind}, tiles: {int(full.n_tiles)}",
        f"keep 1: {_tokens(full)}",
        f"keep {keep:g}: {_tokens(fewer)}",
        "positions: "
        + (
            "of one axis, original or compact"
            if axes is None
            else f"of {len(axes) - 1} axes (M-RoPE), original alone"
        ),
    ]
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    if window is not None:
        lines.append(
            f"sliding window: {window} of the tokens that are left; in a longer prompt with some dropped, "
            "its layers see further back"
        )
    return [
        *lines,
        *_lines("before the language model", before(batch, keep)),
        *_lines("inside the language model", inside(vlm, full)),
    ]


def before(batch: Batch, keep: float) -> Verdicts:
    """Which methods that choose tokens before the language model fit, tried on a batch."""
    verdicts: Verdicts = {}
    for name, row in methods().items():
        if row.learned is None:
            verdicts[name] = _why_not(prepare, batch, name, keep)
            continue
        scorer: Any = scorer_class(name)
        why = _why_not(scorer.check_tower, batch.vlm.model.config)
        verdicts[name if why else f"{name} (with a {row.learned} trained on this model)"] = why
    return verdicts


def inside(vlm: Vlm, reduced: Reduced) -> Verdicts:
    """Which schedules fit the language model and a prompt from which nothing is dropped."""
    verdicts: Verdicts = {}

    def place(name: str) -> None:
        with pruned(vlm.model, reduced.prompt, _schedule(name, len(decoder_of(vlm.model).layers))):
            pass

    for name in SCHEDULES:
        if "predictor" not in schedule_options(name):
            verdicts[name] = _why_not(place, name)
            continue
        why = _why_not(decoder_of, vlm.model)
        verdicts[name if why else f"{name} (with a predictor trained on this model)"] = why
    return verdicts


def _why_not(attempt: Callable[..., object], *given: Any) -> str | None:
    """The line of the error that an attempt ends in; ``None`` if it ends well."""
    try:
        attempt(*given)
    except TokenselError as error:
        return str(error)
    return None


def _schedule(name: str, depth: int) -> Schedule:
    """The schedule with the layers that an evaluation would give it in a model of ``depth`` layers."""
    options: dict[str, Any] = cuts_at_depth(name, depth)
    if "layer" in schedule_options(name):
        options["layer"] = depth // 2 if getattr(SCHEDULES[name], "withdraws", False) else min(2, depth - 1)
    return make_schedule(name, **options)


def _tokens(reduced: Reduced) -> str:
    prompt = int(reduced["attention_mask"].sum())
    newlines = f" and {int(reduced.n_newline)} newlines" if int(reduced.n_newline) else ""
    return f"{int(reduced.n_visual)} visual tokens{newlines} in a prompt of {prompt}"


def _lines(where: str, verdicts: Verdicts) -> list[str]:
    fit = ", ".join(name for name, why in verdicts.items() if why is None)
    return [
        f"fit {where}: {fit or 'nothing'}",
        *(f"  not {name}: {why}" for name, why in verdicts.items() if why),
    ]
