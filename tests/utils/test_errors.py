"""Checks that several options share."""

import numpy as np
import pytest

from tokensel.schedules import Feather
from tokensel.scorers import make_scorer
from tokensel.utils.errors import TokenselError, check_count


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_a_number_that_counts_nothing_gets_one_line(value):
    makers = [lambda: check_count("steps", value, 8), lambda: Feather(stride=value)]
    if isinstance(value, int):  # others are refused by their type in tests
        makers += [lambda: make_scorer("apet", basis=value), lambda: make_scorer("dart", pivots=value)]
    for make in makers:
        with pytest.raises(TokenselError, match="give a whole number of at least 1, such as") as error:
            make()
        assert repr(value) in str(error.value) and "\n" not in str(error.value)


def test_a_number_of_another_library_is_a_number():
    count = check_count("steps", np.int64(3), 8)
    assert count == 3 and type(count) is int
