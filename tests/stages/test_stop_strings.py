"""Stop strings are found across the borders of pieces, and no part of one is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitbundle import BundleError
from splitbundle.stages.text_generation import StopStrings, stop_strings

LETTERS = st.text("ab<|", max_size=12)


@given(st.lists(LETTERS, max_size=12), st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    finder, shown = StopStrings(stops), []
    for piece in pieces:
        shown.append(finder.feed(piece))
        if finder.found is not None:
            break
    given_until = "".join(pieces[: len(shown)])
    shown.append(finder.rest())
    places = [given_until.find(stop) for stop in stops if stop in given_until]
    expected = given_until[: min(places)] if places else given_until
    assert "".join(shown) == expected
    if finder.found is None:
        assert not any(stop in "".join(pieces) for stop in stops)
    else:
        assert given_until.startswith(finder.found, len(expected))
        assert finder.feed("more") == ""


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_no_more_is_held_back_than_may_belong_to_a_stop_string(text: str, stop: str) -> None:
    finder = StopStrings([stop])
    shown = "".join(finder.feed(letter) for letter in text)
    if finder.found is None:
        held = text[len(shown) :]
        assert text == shown + held
        assert stop.startswith(held)
        assert not any(stop.startswith(text[at:]) for at in range(len(shown)) if len(text) - at < len(stop))


def test_of_two_stop_strings_at_one_place_the_longer_one_is_found() -> None:
    finder = StopStrings(["end", "end."])
    assert finder.feed("the end. more") == "the "
    assert finder.found == "end."


@pytest.mark.parametrize("wrong", ["", ["a", ""], [1], ["x"] * 65])
def test_what_can_not_be_a_stop_string_is_refused(wrong: object) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] stop: expected a text, or up to 64 texts"):
        stop_strings(wrong)  # type: ignore[arg-type]
