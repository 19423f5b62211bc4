"""What a measurement of cost is asked to do, checked before anything heavy is loaded."""

from dataclasses import dataclass

from tokensel.utils.errors import TokenselError, check_keep

FEWEST = 10  # repetitions below which no median is worth its name
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CostConfig:
    """One measurement: picture size x batch size x method x keep, all beside the stock model with every token.

    Attributes:
        model: folder or hub id of a LLaVA-NeXT, or a row of :data:`tokensel.profiling.shapes.SHAPES`.
        random_weights: take only the configuration of ``model`` and draw the weights, as is always done for a row of
            the table: how long a model takes depends on its shapes and not on its weights.
        selector: folder or hub id of a trained selector; without one, random weights in the shape below.
        selector_layers: Transformer layers of such a selector: fewer make it slim.
        methods: see :func:`tokensel.methods.check_method`; all but "native" and "dyrate".
        keeps: fractions of the visual tokens to keep, each in (0, 1].
        batch_sizes: questions at a time.
        images: pictures' sizes in pixels, each as HEIGHTxWIDTH.
        text: tokens of the prompt besides the picture.
        new_tokens: tokens of an answer, the first among them.
        repetitions: rounds; each runs every condition once, one after the other.
        warmup: rounds before those that count.
        schedule_layer: layer at whose entrance a schedule drops.
        device, dtype: ``auto`` takes a GPU where there is one, and its 16-bit floats.
        attn: attention of transformers, such as "sdpa" or "flash_attention_2".
        threads: of the CPU; 0 leaves them as they are.
        seed: of weights, pictures and random selection.
        out: folder of the results.
        name: file name of the results, without ending.
    """

    model: str
    random_weights: bool = False
    selector: str | None = None
    selector_layers: int = 3
    methods: tuple[str, ...] = ("selector",)
    keeps: tuple[float, ...] = (0.5, 0.3, 0.1)
    batch_sizes: tuple[int, ...] = (1,)
    images: tuple[str, ...] = ("480x640",)
    text: int = 60
    new_tokens: int = 9
    repetitions: int = FEWEST
    warmup: int = 1
    schedule_layer: int = 2
    device: str = "auto"
    dtype: str = "auto"
    attn: str = "sdpa"
    threads: int = 0
    seed: int = 0
    out: str = "_build/results"
    name: str = "cost"

    def __post_init__(self) -> None:
        from tokensel.methods import check_method

        for method in self.methods:
            if method == "native" or check_method(method).schedule == "dyrate":
                raise TokenselError(
                    f"method '{method}' is not measured: it needs more than shapes; leave it out"
                )
        for keep in self.keeps:
            check_keep(keep)
        for image in self.images:
            image_size(image)
        if self.dtype not in DTYPES:
            raise TokenselError(f"dtype is {self.dtype!r}: choose from {', '.join(DTYPES)}")
        if self.repetitions < FEWEST:
            raise TokenselError(
                f"repetitions is {self.repetitions}: give at least {FEWEST}, fewer say too little"
            )
        if self.new_tokens < 2:
            raise TokenselError(
                f"new_tokens is {self.new_tokens}: give at least 2, so that there is a further token"
            )
        for name, least in {
            "selector_layers": 1,
            "text": 1,
            "schedule_layer": 1,
            "warmup": 0,
            "threads": 0,
        }.items():
            if getattr(self, name) < least:
                raise TokenselError(f"{name} is {getattr(self, name)}: give at least {least}")
        for size in self.batch_sizes:
            if size < 1:
                raise TokenselError(f"batch size is {size}: give at least 1")


def image_size(text: str) -> tuple[int, int]:
    """Height and width out of ``480x640``.

    Raises:
        TokenselError: the text says no such thing.
    """
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise TokenselError(f"image size is {text!r}: give HEIGHTxWIDTH in pixels, such as 480x640")
    return int(height), int(width)
