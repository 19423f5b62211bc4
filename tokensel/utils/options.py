"""What a field of a configuration means and may hold; the command line and the checks read it from here."""

import math
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tokensel.utils.errors import TokenselError


@dataclass(frozen=True)
class Option:
    """What a field means and may hold, in its annotation: ``Annotated[int, Option("Seed.", "Running")]``.

    Attributes:
        help: one sentence for the command line.
        panel: the heading under which the command line lists it.
        least, most: the smallest and the largest number allowed.
        above: numbers must be larger than this.
        example: a good value, named when a bad one is refused.
    """

    help: str
    panel: str
    least: int | float | None = None
    most: int | float | None = None
    above: int | float | None = None
    example: str = ""


def revision_option(panel: str) -> Option:
    """The option that says which revision of a model on the Hub is meant.

    There is none for a token: it would end up in the provenance, so it is read from where the Hub's own tools
    look.
    """
    return Option(
        "Branch, tag or commit of the model on the Hub. Tokens: set HF_TOKEN or run `hf auth login`.", panel
    )


SEED_MOST = 2**32 - 1  # what every random generator behind us takes


@dataclass(frozen=True)
class Field:
    """One field of a configuration, as :func:`fields_of` reads it.

    Attributes:
        name, option: its name and its :class:`Option`.
        kind: ``str``, ``bool``, ``int``, ``float`` or a ``Literal``; of a list, that of its entries.
        many: whether it is a list.
        optional: whether ``None`` is allowed.
        default: its default, or ``dataclasses.MISSING``.
    """

    name: str
    option: Option
    kind: Any
    many: bool
    optional: bool
    default: Any

    @property
    def required(self) -> bool:
        return self.default is MISSING


def fields_of(config: Any) -> list[Field]:
    """The fields of a configuration, a dataclass or an instance of one, in their order."""
    read = []
    for field in fields(config):
        kind, option = get_args(field.type)
        optional = get_origin(kind) in (Union, UnionType)
        if optional:
            (kind,) = (part for part in get_args(kind) if part is not NoneType)
        many = get_origin(kind) is tuple
        read.append(
            Field(field.name, option, get_args(kind)[0] if many else kind, many, optional, field.default)
        )
    return read


def check_fields(config: Any) -> None:
    """Check type and range of every field of a frozen dataclass; lists become tuples, whole numbers floats.

    Raises:
        TokenselError: one line with the field, its value and what to give.
    """
    for field in fields_of(config):
        value = getattr(config, field.name)
        if field.many:
            if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
                raise TokenselError(f"{field.name} is {value!r}: give a list of {_PLURAL[_word(field.kind)]}")
            value = tuple(_checked(field, each) for each in value)
        elif value is not None or not field.optional:
            value = _checked(field, value)
        object.__setattr__(config, field.name, value)


def _checked(field: Field, value: Any) -> Any:
    option, number = field.option, _converted(field.kind, value)
    wrong = number is None
    if not wrong and field.kind in (int, float):
        # written so that NaN, which fails every comparison, is wrong too
        wrong = not (
            math.isfinite(number)
            and (option.least is None or number >= option.least)
            and (option.most is None or number <= option.most)
            and (option.above is None or number > option.above)
        )
    if wrong:
        # of a list one entry is wrong: "keep is 2.0" and not "keeps is"
        name = field.name.removesuffix("s") if field.many else field.name
        raise TokenselError(f"{name} is {value!r}: give {_allowed(field)}")
    return number


def _converted(kind: Any, value: Any) -> Any:
    """The value as a plain ``kind``; ``None`` if it is of another type."""
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else None
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return text if isinstance(text, str) else None
    if isinstance(value, bool):  # Python takes True for 1, a reader does not
        return None
    if kind is float:
        return float(value) if isinstance(value, Real) else None
    try:
        return operator.index(value)  # NumPy's whole numbers too
    except TypeError:
        return None


_PLURAL = {"text": "texts", "a number": "numbers", "a whole number": "whole numbers"}


def _word(kind: Any) -> str:
    return {str: "text", bool: "True or False", int: "a whole number", float: "a number"}[kind]


def _allowed(field: Field) -> str:
    """What to give, in words: "a whole number of at least 1"."""
    option = field.option
    if get_origin(field.kind) is Literal:
        return f"one of {', '.join(get_args(field.kind))}"
    word = _word(field.kind)
    if option.least is not None and option.most is not None:
        word = f"{word} between {option.least} and {option.most}"
    elif option.least is not None:
        word = f"{word} of at least {option.least}"
    elif option.above is not None and option.most is not None:
        word = f"{word} above {option.above} and at most {option.most}"
    elif option.above is not None:
        word = f"{word} above {option.above}"
    return f"{word}, such as {option.example}" if option.example else word
