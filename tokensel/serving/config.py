"""What a served model keeps, checked before anything heavy is loaded.

``python -m tokensel serve`` writes it into vLLM's ``--hf-overrides`` under the name ``tokensel``, where the
plugin reads it in every process of the engine.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, no_type_check

from tokensel.utils.errors import TokenselError
from tokensel.utils.options import SEED_MOST, Option, check_fields, revision_option

__all__ = ["ServeConfig"]

# headings under which the command line lists the options
MODEL, KEEPING = "Model", "What is kept"
# the number of tokens of an image depends on what is in it, and an engine counts them before it looks
_UNKNOWN = {
    ("keep", None): "0.5",
    ("newline", "row"): "keep or drop",
    ("budget", "threshold"): "image or tile",
}


@no_type_check  # check_fields does it, with a message for users
@dataclass(frozen=True)
class ServeConfig:
    """A model, and what is kept of the visual tokens of every image that it is asked about.

    Each field says what it means and what it may hold; see also :class:`~tokensel.vlm.choose.Choices`.

    Raises:
        TokenselError: a value of another type or out of range, or a choice that leaves open how many tokens
            an image has; one line with field, value and what to give.
    """

    model: Annotated[str, Option("LLaVA-NeXT, LLaVA-OneVision or Qwen2.5-VL: folder or Hub id.", MODEL)]
    revision: Annotated[str | None, revision_option(MODEL)] = None
    keep: Annotated[
        float,
        Option(
            "Fraction of the visual tokens to keep, where a request does not name its own.",
            KEEPING,
            above=0,
            most=1,
            example="0.5",
        ),
    ] = 0.5
    scorer: Annotated[str, Option("What ranks the tokens: selector, norm, diversity ...", KEEPING)] = (
        "selector"
    )
    selector: Annotated[str | None, Option("Trained selector: folder or Hub id.", KEEPING)] = None
    diffprune: Annotated[str | None, Option("Trained DiffPrune: folder or Hub id.", KEEPING)] = None
    visionselector: Annotated[str | None, Option("Trained VisionSelector: folder or Hub id.", KEEPING)] = None
    seed: Annotated[int, Option("Seed of the scorer random.", KEEPING, least=0, most=SEED_MOST)] = 0
    budget: Annotated[
        Literal["image", "tile"],
        Option("image: one competition an image; tile: each tile its share.", KEEPING),
    ] = "image"
    thumbnail: Annotated[
        Literal["compete", "keep", "last", "drop"], Option("What happens to cells of the thumbnail.", KEEPING)
    ] = "compete"
    neighbours: Annotated[
        int, Option("Cells to each side in its row that a kept cell brings along.", KEEPING, least=0)
    ] = 0
    newline: Annotated[Literal["keep", "drop"], Option("What happens to newlines.", KEEPING)] = "keep"

    def __post_init__(self) -> None:
        for (name, value), give in _UNKNOWN.items():
            if getattr(self, name) == value:
                raise TokenselError(
                    f"{name} is {value!r}: an engine counts the tokens of an image before it looks at it, "
                    f"and cannot serve this; give {give}"
                )
        check_fields(self)

    @classmethod
    def of(cls, config: Any) -> "ServeConfig":
        """What an engine was started with.

        Args:
            config: the configuration of its model, of transformers.

        Raises:
            TokenselError: it was started without, or with something else.
        """
        given = getattr(config, "tokensel", None)
        if not isinstance(given, dict):
            raise TokenselError(
                "hf_overrides has no 'tokensel': start the engine with `python -m tokensel serve`, or give "
                "{'tokensel': {'model': ..., 'keep': 0.5, 'selector': ...}}"
            )
        try:
            return cls(**given)
        except TypeError as error:  # an unknown or missing field
            raise TokenselError(f"hf_overrides: tokensel: {error}") from None

    @property
    def choices(self) -> dict[str, Any]:
        """The fields that are :class:`~tokensel.vlm.choose.Choices`.

        Positions are compact, but for a model that gives a visual token its place in the image.
        """
        names = ("budget", "thumbnail", "neighbours", "newline")
        return {name: getattr(self, name) for name in names} | {"positions": "compact"}

    def overrides(self, architecture: str) -> dict[str, Any]:
        """The value of vLLM's ``hf_overrides``.

        Args:
            architecture: name of the plugin's class for this model.
        """
        return {"architectures": [architecture], "tokensel": asdict(self)}
