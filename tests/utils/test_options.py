"""Fields of a configuration: what is accepted, converted and refused, for every kind of field."""

from dataclasses import dataclass
from inspect import unwrap
from typing import Annotated, Literal, no_type_check

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokensel.utils.errors import CheckpointError, DiskError, TokenselError, check_keep, needs
from tokensel.utils.files import load_tensors, no_space, write_text
from tokensel.utils.options import Option, check_fields, fields_of


@no_type_check
@dataclass(frozen=True)
class Example:
    name: Annotated[str, Option("Text.", "A")] = "a"
    on: Annotated[bool, Option("Switch.", "A")] = False
    n: Annotated[int, Option("At least 1.", "A", least=1)] = 1
    rate: Annotated[float, Option("Above 0.", "B", above=0, example="0.1")] = 0.5
    part: Annotated[float, Option("Fraction.", "B", least=0, most=1)] = 0.5
    limit: Annotated[int | None, Option("May be left out.", "B", least=1)] = None
    kind: Annotated[Literal["x", "y"], Option("One of two.", "B")] = "x"
    keeps: Annotated[tuple[float, ...], Option("Fractions.", "B", above=0, most=1)] = ()
    words: Annotated[tuple[str, ...], Option("Texts.", "B")] = ()

    def __post_init__(self):
        check_fields(self)


def test_fields_are_read_with_their_kind():
    found = {field.name: (field.kind, field.many, field.optional) for field in fields_of(Example)}
    assert found["limit"] == (int, False, True) and found["keeps"] == (float, True, False)
    assert found["kind"] == (Literal["x", "y"], False, False)
    assert not any(field.required for field in fields_of(Example()))


def test_values_of_a_near_type_are_converted(tmp_path):
    example = Example(name=tmp_path, n=np.int64(3), rate=2, limit=4, keeps=[1, np.float32(0.5)], words=["a"])
    assert example.name == str(tmp_path) and example.keeps == (1.0, 0.5) and example.words == ("a",)
    assert [type(v) for v in (example.n, example.rate, example.keeps[0])] == [int, float, float]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"n": 0}, "n is 0: give a whole number of at least 1"),
        ({"n": 2.0}, "n is 2.0: give a whole number of at least 1"),
        ({"n": "2"}, "n is '2': give a whole number of at least 1"),
        ({"n": True}, "n is True: give a whole number of at least 1"),
        ({"n": None}, "n is None: give a whole number of at least 1"),
        ({"rate": float("inf")}, "rate is inf: give a number above 0, such as 0.1"),
        ({"rate": float("nan")}, "rate is nan: give a number above 0, such as 0.1"),
        ({"part": 1.5}, "part is 1.5: give a number between 0 and 1"),
        ({"limit": 0}, "limit is 0: give a whole number of at least 1"),
        ({"kind": "z"}, "kind is 'z': give one of x, y"),
        ({"name": 3}, "name is 3: give text"),
        ({"on": 1}, "on is 1: give True or False"),
        ({"keeps": 0.3}, "keeps is 0.3: give a list of numbers"),
        ({"keeps": "0.3"}, "keeps is '0.3': give a list of numbers"),
        ({"keeps": (0.3, 0.0)}, "keep is 0.0: give a number above 0 and at most 1"),
        ({"words": "ab"}, "words is 'ab': give a list of texts"),
    ],
)
def test_what_does_not_fit_is_one_line(given, line):
    with pytest.raises(TokenselError) as caught:
        Example(**given)
    assert str(caught.value) == line


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()), st.complex_numbers(), st.just(object()),
)  # fmt: skip


@given(name=st.sampled_from([field.name for field in fields_of(Example)]), value=ANYTHING)
def test_any_value_is_taken_as_meant_or_refused(name, value):
    try:
        taken = getattr(Example(**{name: value}), name)
    except TokenselError as error:
        assert "\n" not in str(error).replace(repr(value), "") and str(error).startswith(name[:4].rstrip("s"))
    else:
        assert taken == (tuple(value) if isinstance(value, (list, tuple)) else value)


@pytest.mark.parametrize("keep", [0, 1.5, float("nan"), -0.1, "0.3", None, True, [0.3]])
def test_what_is_no_fraction_to_keep_is_refused(keep):
    with pytest.raises(TokenselError, match="give a fraction in"):
        unwrap(check_keep)(keep)  # as users have it, without the type checks of the tests


def test_errors_are_of_the_kind_that_a_caller_decides_by(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "cut.safetensors")
    assert isinstance(no_space(OSError("full"), "out"), DiskError)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"cannot write here .*; give another folder"):
        write_text(tmp_path / "file" / "below.txt", "")
    with (
        pytest.raises(TokenselError, match="no_such_package is not installed: run `pip install"),
        needs("eval"),
    ):
        import no_such_package.part  # noqa: F401
