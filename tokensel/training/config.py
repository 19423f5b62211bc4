"""Every choice of a training, with its reason where the paper leaves it open."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from tokensel.utils.errors import TokenselError, check_names


@dataclass(frozen=True)
class TrainConfig:
    """How a selector and its reconstructor are trained; see the comment beside each field.

    Raises:
        TokenselError: a value out of its range; one line with the field, the value and what to give.
    """

    # --- data ---------------------------------------------------------------------------------------------
    images: str = ""  # a folder, a parquet file or hub dataset, name[:config]:split; the paper: 100K of COCO
    encoder: str = ""  # hub id or folder: a CLIP or SigLIP tower, or a LLaVA checkpoint that holds one
    out: str = ""  # folder of checkpoint, history, selector and reconstructor; "" writes nothing
    column: str = "image"  # where a dataset keeps the picture
    streaming: bool = False  # read a hub dataset row by row, in its own order, without fetching it first
    limit: int | None = None  # only the first so many pictures
    tiles: str = "whole"  # or "anyres". Sec. 4.5 speaks of images, not tiles: each is squashed to one tile
    cache: str = ""  # folder for the features, to encode each picture once; "" encodes on the fly

    # --- model --------------------------------------------------------------------------------------------
    layers: int = 3  # Secs. 4.1.1 and 4.2, for both models
    heads: int | None = None  # not in the paper: None is 64 channels a head (32 below width 256), as CLIP has
    mlp_ratio: float = 4.0  # not in the paper: the usual Transformer

    # --- objective ----------------------------------------------------------------------------------------
    p: float = 0.3  # Eq. (3); the p of training is not in the paper. 0 switches the hinge off
    tau_start: float = 1.0  # temperature is not in the paper: from 1 to 0.5 as in Jang et al. 2017. In trials
    tau_end: float = 0.5  # on 32-channel features, ends of 0.1 and starts of 0.5 or 2 did no better or worse

    # --- optimisation (none of it in the paper) -----------------------------------------------------------
    steps: int = 10_000  # with 64 images a step: six times through 100K images
    batch_size: int = 64  # of all processes together, so that their number changes nothing
    lr: float = 3e-4  # what the paper's group used for a later feature reconstructor
    warmup: float = 0.05  # share of the steps over which lr rises, from the same work; then a cosine to 0
    weight_decay: float = 0.01  # AdamW's default
    max_grad_norm: float = 1.0  # the l2 norm has a kink at 0 and the hinge at p: single steps can be steep
    statistics_tiles: int = 512  # the first of the run: mean, spread and scale of the features, once

    # --- running ------------------------------------------------------------------------------------------
    seed: int = 0
    save_every: int = 500  # steps between checkpoints
    log_every: int = 10  # steps between updates of the progress bar and of history.jsonl
    workers: int = 2  # threads that decode and resize pictures
    precision: str = "auto"  # "bf16" on GPUs that have it, else "fp32"
    device: str = "auto"  # or "cpu"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("tiles", ("whole", "anyres")), ("precision", ("auto", "fp32", "bf16")),
                              ("device", ("auto", "cpu"))):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise TokenselError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(allowed)}")
        for name in ("layers", "steps", "batch_size", "statistics_tiles", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise TokenselError(f"{name} is {getattr(self, name)}: give a whole number of at least 1")
        for name in ("tau_start", "tau_end", "lr", "mlp_ratio", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise TokenselError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("p", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise TokenselError(
                    f"{name} is {getattr(self, name)}: give a fraction between 0 and 1, such as 0.3"
                )

    @property
    def shape(self) -> tuple[int, int | None, float]:
        """Layers, heads and MLP ratio: what shapes selector and reconstructor besides the width."""
        return self.layers, self.heads, self.mlp_ratio

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Make a configuration from names and values.

        Raises:
            TokenselError: a name that is no field (the nearest one is told), or a value out of range.
        """
        check_names(values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# these may differ between a run and its continuation: none of them changes the result
FREE = frozenset(
    {"out", "save_every", "log_every", "workers", "device", "progress", "images", "encoder", "cache"}
)
