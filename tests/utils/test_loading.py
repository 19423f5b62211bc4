"""Loading quietly leaves the verbosity of transformers as it was, however many threads load."""

from contextlib import ExitStack
from logging import ERROR

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import logging

from tokensel.utils.loading import quiet

# transformers switches the bars of huggingface_hub too, which the environment of the tests has switched off
pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars")


def state() -> tuple[int, bool]:
    return logging.get_verbosity(), logging.is_progress_bar_enabled()


@pytest.fixture(params=[True, False], ids=["bars", "no bars"], scope="module")
def chosen(request):
    """A verbosity and a choice of bars that are not the defaults of both."""
    before = state()
    logging.set_verbosity_info()
    (logging.enable_progress_bar if request.param else logging.disable_progress_bar)()
    yield state()
    logging.set_verbosity(before[0])
    (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


@given(moves=st.lists(st.integers(0, 3), max_size=12))
def test_contexts_that_overlap_restore_what_was_before_the_first(chosen, moves):
    """Contexts 0 to 3 open and close in any order, as those of four threads do."""
    contexts: dict[int, ExitStack] = {}
    for number in moves:
        if number in contexts:
            contexts.pop(number).close()
        else:
            contexts[number] = ExitStack()
            contexts[number].enter_context(quiet())
        assert state() == ((ERROR, False) if contexts else chosen)
    for context in contexts.values():
        context.close()
    assert state() == chosen


def test_an_error_inside_restores_it_too(chosen):
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert state() == chosen
