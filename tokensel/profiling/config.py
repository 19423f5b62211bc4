"""What a measurement of cost is asked to do, checked before anything heavy is loaded."""

import os
from dataclasses import dataclass
from typing import Annotated, Literal, no_type_check

from tokensel.utils.errors import TokenselError
from tokensel.utils.options import SEED_MOST, Option, check_fields, revision_option

FEWEST = 10  # repetitions below which no median is worth its name

# headings under which the command line lists the options
MODEL, DATA, RUNNING, SERVING, TABLES = "Model", "Data", "Running", "Serving", "Tables"


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class CostConfig:
    """One measurement: image size x batch size x method x keep, each compared with the stock model.

    Each field says what it means and what it may hold.

    Raises:
        TokenselError: a value of another type or out of range; one line with field, value and what to give.
    """

    # or a row of tokensel.profiling.shapes.SHAPES
    model: Annotated[
        str,
        Option(
            "Vision-language model: folder or Hub id; or llava-next-0.5b, llava-next-7b: true size, random "
            "weights.",
            MODEL,
        ),
    ]
    revision: Annotated[str | None, revision_option(MODEL)] = None
    # always so for a row of the table: how long a model takes depends on its shapes and not on its weights
    random_weights: Annotated[
        bool,
        Option("Take only the configuration of the model; speed does not depend on its weights.", MODEL),
    ] = False
    selector: Annotated[
        str | None, Option("Trained selector: folder or Hub id; by default random weights.", MODEL)
    ] = None
    # fewer make it slim
    selector_layers: Annotated[
        int, Option("Transformer layers of a selector with random weights.", MODEL, least=1)
    ] = 3
    methods: Annotated[
        tuple[str, ...],
        Option(
            "Comma-separated, compared with the stock model: selector, random, uniform, norm, cls, "
            "diversity, downsample, none, fastv, vtw.",
            RUNNING,
        ),
    ] = ("selector",)
    keeps: Annotated[
        tuple[float, ...],
        Option(
            "Fractions of the visual tokens to keep, comma-separated.",
            RUNNING,
            above=0,
            most=1,
            example="0.3",
        ),
    ] = (0.5, 0.3, 0.1)
    batch_sizes: Annotated[
        tuple[int, ...], Option("Questions at a time, comma-separated.", DATA, least=1)
    ] = (1,)
    images: Annotated[
        tuple[str, ...], Option("Sizes of images in pixels, as HEIGHTxWIDTH, comma-separated.", DATA)
    ] = ("480x640",)
    text: Annotated[int, Option("Tokens of the prompt besides the image.", DATA, least=1)] = 60
    # so that there is a further token besides the first
    new_tokens: Annotated[int, Option("Tokens of an answer, at least 2.", DATA, least=2)] = 9
    # each runs every condition once, one after the other
    repetitions: Annotated[int, Option("Rounds of all conditions, at least 10.", RUNNING, least=FEWEST)] = (
        FEWEST
    )
    warmup: Annotated[int, Option("Rounds before those that count.", RUNNING, least=0)] = 1
    schedule_layer: Annotated[
        int, Option("Layer before which fastv or vtw drops tokens.", RUNNING, least=1)
    ] = 2
    device: Annotated[str, Option("cpu, cuda, cuda:1 ...; auto: a GPU if there is one.", MODEL)] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("auto: float32 on a CPU, 16 bits on a GPU.", MODEL),
    ] = "auto"
    attn: Annotated[str, Option("Attention of transformers: sdpa, flash_attention_2 ...", MODEL)] = "sdpa"
    threads: Annotated[int, Option("Threads of the CPU; 0 leaves them as they are.", RUNNING, least=0)] = 0
    seed: Annotated[
        int, Option("Seed of weights, images and random selection.", RUNNING, least=0, most=SEED_MOST)
    ] = 0
    server: Annotated[
        tuple[str, ...],
        Option("With --serving: comma-separated URLs of running servers of the model.", SERVING),
    ] = ()
    concurrency: Annotated[
        tuple[int, ...],
        Option("With --serving: requests of a server at a time, comma-separated.", SERVING, least=1),
    ] = (1, 4, 16, 64)
    out: Annotated[str, Option("Folder of the results.", TABLES)] = "_build/results"
    name: Annotated[str, Option("File name of the results, without ending.", TABLES)] = "cost"

    def __post_init__(self) -> None:
        check_fields(self)
        cores = os.cpu_count() or 1
        if self.threads > cores:
            raise TokenselError(f"threads is {self.threads}: give at most {cores}, the cores of this machine")
        for image in self.images:
            image_size(image)
        from tokensel.methods import check_method  # after what needs no heavy import

        for method in self.methods:
            row = check_method(method)
            if row.uses_native or row.uses_predictor:
                raise TokenselError(
                    f"method '{method}' is not measured: it needs more than shapes; leave it out"
                )


def image_size(text: str) -> tuple[int, int]:
    """Height and width out of ``480x640``.

    Raises:
        TokenselError: the text is not of this form.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise TokenselError(f"image size is {text!r}: give HEIGHTxWIDTH in pixels, such as 480x640")
    return int(height), int(width)
