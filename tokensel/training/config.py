"""Every choice of a training, with its reason where the paper leaves it open. Imports no heavy package.

The selectors that ship with the book were trained with these defaults, for fewer steps of fewer tiles, see
data/README.md.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, no_type_check

from tokensel.utils.errors import TokenselError, check_names
from tokensel.utils.options import SEED_MOST, Option, check_fields, revision_option

# headings under which the command line lists the options
DATA, MODEL, OBJECTIVE, OPTIMISATION, RUNNING = "Data", "Model", "Objective", "Optimisation", "Running"


# What is chosen where nothing is given depends on the gate: p, the largest p, and tau at both ends. The
# paper's gate has one p. From 1 to 0.5, as in Jang et al. 2017, its selectors settled on positions, whatever
# the image showed. A gate that divides a budget can be trained for all budgets at once.
_BY_GATE: dict[str, tuple[float, float | None, float, float]] = {
    "gumbel": (0.3, None, 2.0, 1.0),
    "topk": (0.05, 0.6, 2.0, 1.0),
    "scale": (0.05, 0.6, 2.0, 0.1),
    "throttle": (0.05, 0.6, 2.0, 0.1),
}
_CHOSEN_BY_GATE: Any = None

# options that every training has
_LearningRate = Annotated[float, Option("Peak learning rate.", OPTIMISATION, above=0)]
_Warmup = Annotated[
    float,
    Option(
        "Fraction of the steps over which the learning rate rises.",
        OPTIMISATION,
        least=0,
        most=1,
        example="0.05",
    ),
]
_MaxGradNorm = Annotated[
    float, Option("Clip gradients whose norm is larger than this.", OPTIMISATION, above=0)
]


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class TrainConfig:
    """How a selector and its reconstructor are trained; each field says what it means and what it may hold.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    # the paper: 100K images of COCO
    images: Annotated[str, Option("Folder, parquet file, or Hub dataset as name[:config]:split.", DATA)] = ""
    encoder: Annotated[
        str, Option("Vision tower, or vision-language model that holds one: folder or Hub id.", DATA)
    ] = ""
    # "" writes nothing
    out: Annotated[str, Option("Folder for checkpoint, history, selector, reconstructor.", DATA)] = ""
    column: Annotated[str, Option("Dataset column that holds the image.", DATA)] = "image"
    streaming: Annotated[
        bool, Option("Read a Hub dataset row by row, in its own order, without downloading it first.", DATA)
    ] = False
    limit: Annotated[int | None, Option("Use only the first images, this many.", DATA, least=1)] = None
    # Sec. 4.5 of the paper trains on images, not tiles: each is resized to one tile
    tiles: Annotated[
        Literal["whole", "anyres"],
        Option("Resize each image to one tile, or cut it into tiles as its model does.", DATA),
    ] = "whole"
    # "" encodes at every step
    cache: Annotated[str, Option("Folder for features, to encode each image only once.", DATA)] = ""

    # Secs. 4.1.1 and 4.2, for both models
    layers: Annotated[int, Option("Transformer layers of selector and reconstructor.", MODEL, least=1)] = 3
    # not in the paper: None is 64 channels a head (32 below width 256), as CLIP has
    heads: Annotated[int | None, Option("Attention heads; by default 64 channels each.", MODEL, least=1)] = (
        None
    )
    # not in the paper: the usual Transformer
    mlp_ratio: Annotated[float, Option("Width of the MLP divided by the model width.", MODEL, above=0)] = 4.0

    # the paper's loss names no unit; None is "projector" where a model that reads the features is at hand,
    # and "features" elsewhere
    metric: Annotated[
        Literal["features", "channel", "token", "whitened", "projector", "keys-values", "reader"] | None,
        Option(
            "Where an error of the reconstruction is measured: in raw features, with channels or tokens of "
            "equal length, without correlations, behind the projector, in the first layer's keys and "
            "values, or by how much the language model's answers move; by default behind the projector, "
            "where encoder is a LLaVA checkpoint, else in raw features.",
            OBJECTIVE,
        ),
    ] = None
    metric_images: Annotated[
        int, Option("Images on which the metric 'reader' is measured.", OBJECTIVE, least=1)
    ] = 64
    metric_prompts: Annotated[
        tuple[str, ...],
        Option("What the language model is asked about each of them, comma-separated.", OBJECTIVE),
    ] = ("Describe the image.", "What is written in the image?")
    # the paper's is gumbel, see tokensel.model.gates
    gate: Annotated[
        Literal["gumbel", "topk", "scale", "throttle"],
        Option(
            "gumbel: each token by itself, under the hinge of Eq. (3); topk, scale, throttle: exactly p of "
            "the batch, by a hard choice, by scaling tokens, or by mixing them with noise.",
            OBJECTIVE,
        ),
    ] = "throttle"
    # the p of training is not in the paper; 0 switches the hinge off
    p: Annotated[
        float,
        Option(
            "Fraction of tokens up to which keeping costs nothing, Eq. (3), or which a gate keeps; by "
            "default 0.3 for gumbel, and for the others drawn for each step between 0.05 and 0.6.",
            OBJECTIVE,
            least=0,
            most=1,
            example="0.3",
        ),
    ] = _CHOSEN_BY_GATE
    p_most: Annotated[
        float | None,
        Option("Draw p for each step between p and this; needs a gate other than gumbel.", OBJECTIVE),
    ] = None
    # not in the paper
    tau_start: Annotated[
        float, Option("Temperature of the gate at the first step; by default 2.", OBJECTIVE, above=0)
    ] = _CHOSEN_BY_GATE
    tau_end: Annotated[
        float,
        Option(
            "Temperature of the gate at the last step; by default 1 for gumbel and topk, 0.1 for the others.",
            OBJECTIVE,
            above=0,
        ),
    ] = _CHOSEN_BY_GATE

    # none of the optimisation is in the paper; 10,000 steps of 64 images are six epochs of 100K images
    steps: Annotated[int, Option("Optimiser steps.", OPTIMISATION, least=1)] = 10_000
    # of all processes together, so that their number changes nothing
    batch_size: Annotated[int, Option("Tiles a step, of all processes together.", OPTIMISATION, least=1)] = 64
    # what the paper's group used for a later feature reconstructor; the warm-up is from the same work
    lr: _LearningRate = 3e-4
    # after it the learning rate follows a cosine to 0
    warmup: _Warmup = 0.05
    # AdamW's default
    weight_decay: Annotated[float, Option("Weight decay of AdamW.", OPTIMISATION, least=0)] = 0.01
    # the l2 norm has a kink at 0 and the hinge at p: single steps can be steep
    max_grad_norm: _MaxGradNorm = 1.0
    # the first of the run
    statistics_tiles: Annotated[
        int,
        Option("Tiles from which mean and standard deviation are measured, once.", OPTIMISATION, least=1),
    ] = 512

    seed: Annotated[int, Option("Seed of weights, order and noise.", RUNNING, least=0, most=SEED_MOST)] = 0
    save_every: Annotated[int, Option("Steps between checkpoints.", RUNNING, least=1)] = 500
    log_every: Annotated[int, Option("Steps between lines of history.jsonl.", RUNNING, least=1)] = 10
    workers: Annotated[int, Option("Threads that decode and resize images.", RUNNING, least=0)] = 2
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Option("auto: bf16 where the GPU has it, else fp32.", RUNNING)
    ] = "auto"
    device: Annotated[Literal["auto", "cpu"], Option("auto: a GPU if there is one.", RUNNING)] = "auto"
    progress: Annotated[bool, Option("Show a progress bar on stderr.", RUNNING)] = True

    def __post_init__(self) -> None:
        p, p_most, *tau = _BY_GATE.get(self.gate, _BY_GATE["gumbel"])  # check_fields refuses another gate
        if self.p is None:
            object.__setattr__(self, "p", p)
            object.__setattr__(self, "p_most", p_most if self.p_most is None else self.p_most)
        for name, value in zip(("tau_start", "tau_end"), tau, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_fields(self)
        if self.gate != "gumbel" and not 0 < self.p < 1:
            raise TokenselError(f"p is {self.p}: the gate '{self.gate}' needs a fraction between 0 and 1")
        if self.p_most is not None:
            if self.gate == "gumbel":
                raise TokenselError(f"p_most is {self.p_most}: give a gate other than gumbel, or none")
            if not self.p < self.p_most < 1:
                raise TokenselError(f"p_most is {self.p_most}: give a fraction between p = {self.p} and 1")

    @property
    def shape(self) -> tuple[int, int | None, float]:
        """Layers, heads and MLP ratio: what shapes selector and reconstructor besides the width."""
        return self.layers, self.heads, self.mlp_ratio

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Make a configuration from names and values.

        Raises:
            TokenselError: a name that is no field (the line names the nearest one), or a value out of range.
        """
        check_names(values, [field.name for field in fields(cls)])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, as JSON gives them back."""
        return json.loads(json.dumps(asdict(self)))


# these may differ between a run and its continuation: none of them changes the result
FREE = frozenset(
    {"out", "save_every", "log_every", "workers", "device", "progress", "images", "encoder", "cache"}
)

_Config = TypeVar("_Config", bound="QuestionsConfig")  # a subclass makes its own kind


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class QuestionsConfig:
    """What a training on the questions of a suite has to know, whatever is trained.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    model: Annotated[str, Option("Vision-language model: folder or Hub id.", DATA)]
    suite: Annotated[str, Option("Module with a table BENCHMARKS, by its dotted name.", DATA)]
    revision: Annotated[str | None, revision_option(DATA)] = None
    # "" writes nothing
    out: Annotated[str, Option("Folder for checkpoint, history and what is trained.", DATA)] = ""
    benchmarks: Annotated[
        tuple[str, ...], Option("Benchmarks of the suite, comma-separated; all by default.", DATA)
    ] = ()
    split: Annotated[str, Option("Split of every benchmark.", DATA)] = "train"
    n: Annotated[int, Option("Questions a benchmark, the first of the split.", DATA, least=1)] = 200
    steps: Annotated[int, Option("Optimiser steps.", OPTIMISATION, least=1)] = 100
    batch_size: Annotated[int, Option("Questions a step.", OPTIMISATION, least=1)] = 8
    lr: _LearningRate = 1e-3
    # after it the learning rate follows a cosine to 0
    warmup: _Warmup = 0.05
    weight_decay: Annotated[float, Option("Weight decay of AdamW.", OPTIMISATION, least=0)] = 0.0
    max_grad_norm: _MaxGradNorm = 1.0
    seed: Annotated[
        int,
        Option("Seed of weights, questions drawn and noise.", RUNNING, least=0, most=SEED_MOST),
    ] = 0
    save_every: Annotated[int, Option("Steps between checkpoints.", RUNNING, least=1)] = 25
    device: Annotated[str, Option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", RUNNING)] = "auto"
    progress: Annotated[bool, Option("Show a progress bar on stderr.", RUNNING)] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
        """Make a configuration from names and values.

        Raises:
            TokenselError: a name that is no field (the line names the nearest one), or a value out of range.
        """
        check_names(values, [field.name for field in fields(cls)])
        return cls(**values)

    def result(self) -> dict[str, Any]:
        """The choices that decide the result, as JSON gives them back; the model is known by its digest."""
        return json.loads(
            json.dumps(
                {name: value for name, value in asdict(self).items() if name not in ("model", "revision")}
            )
        )


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class FrozenModelConfig(QuestionsConfig):
    """How something is trained by the answers of a model that stays as it is, with choices that soften.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    # as for the selector
    tau_start: Annotated[float, Option("Temperature of choices at the first step.", OBJECTIVE, above=0)] = 1.0
    tau_end: Annotated[float, Option("Temperature of choices at the last step.", OBJECTIVE, above=0)] = 0.5


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class DyRateConfig(FrozenModelConfig):
    """How DyRate's rate predictor is trained. None of the numbers is in its abstract (arXiv 2501.14204).

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    # as in FastV
    layer: Annotated[int, Option("First layer at which tokens are dropped.", MODEL, least=1)] = 2
    # k of the paper
    rates: Annotated[
        int, Option("Number of rates to choose from, at least 2.", MODEL, least=2, example="10")
    ] = 10
    # what the fraction kept counts for beside the cross entropy, in nats per token
    weight: Annotated[
        float,
        Option(
            "Weight of the visual tokens kept against the cross entropy.", OBJECTIVE, least=0, example="0.1"
        ),
    ] = 1.0
    # its abstract has a Gumbel-Softmax; the loss at every rate is lower, see tokensel.training.dyrate
    gradient: Annotated[
        Literal["all-rates", "straight-through"],
        Option("Learn from the loss at every rate, or by a Gumbel-Softmax from the one drawn.", OBJECTIVE),
    ] = "all-rates"
    # high, for a linear layer on fractions between 0 and 1
    lr: _LearningRate = 0.1


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class AnswersConfig(FrozenModelConfig):
    """How a scorer is trained by the answers of a frozen model; see :mod:`tokensel.training.answers`.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    scorer: Annotated[Literal["diffprune", "visionselector"], Option("What is trained.", MODEL)] = "diffprune"
    # DiffPrune names no budget; VisionSelector was trained at a fifth
    keep: Annotated[
        float,
        Option(
            "Fraction of an image's visual tokens kept in training.",
            OBJECTIVE,
            above=0,
            most=1,
            example="0.2",
        ),
    ] = 0.2
    # one scorer for several budgets
    keep_most: Annotated[
        float | None, Option("Draw the fraction for each step between keep and this.", OBJECTIVE)
    ] = None
    # DiffPrune: a cosine from 2 to 0.1
    tau_start: Annotated[
        float, Option("Temperature of diffprune's choice at the first step.", OBJECTIVE, above=0)
    ] = 2.0
    tau_end: Annotated[
        float, Option("Temperature of diffprune's choice at the last step.", OBJECTIVE, above=0)
    ] = 0.1
    # VisionSelector: from 0.1 to 2
    hard_start: Annotated[
        float,
        Option("Weight at the first step of visionselector's distance to a hard choice.", OBJECTIVE, least=0),
    ] = 0.1
    hard_end: Annotated[
        float,
        Option("Weight at the last step of visionselector's distance to a hard choice.", OBJECTIVE, least=0),
    ] = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == 1:
            raise TokenselError(f"keep is {self.keep}: give a fraction between 0 and 1")
        if self.keep_most is not None and not self.keep < self.keep_most < 1:
            raise TokenselError(
                f"keep_most is {self.keep_most}: give a fraction between keep = {self.keep} and 1"
            )
