"""Marked text: each method gives the text that str gives, and no character loses its mark.

The marks of these texts follow from the characters: some letters are a user's, spaces are the model's, the rest is the
template's. So the marks of a result can be told from its text.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitbundle.text.marked import MODEL, TEMPLATE, USER, Marked, greatest, marks_of

USERS: Final = "abABßsSİIi\u0307ŉʼNnΣςσ\U0001f642"
SPACES: Final = " \t\n\r\u2028\u00a0"
OTHERS: Final = "xyXY-+0%{}é"
TEXT: Final = st.text(st.sampled_from(USERS + SPACES + OTHERS), max_size=12)
SHORT: Final = st.text(st.sampled_from("ab x"), min_size=1, max_size=2)
NUMBER: Final = st.integers(-3, 15)
BOUND: Final = st.none() | NUMBER
TABLE: Final = {ord("a"): "bb", ord("b"): None, ord(" "): "\n", ord("x"): ord("y")}


def owners(text: str) -> bytes:
    """Return the mark of each character."""
    return bytes(USER if each in USERS else MODEL if each in SPACES else TEMPLATE for each in text)


def marked(value: Any) -> Any:
    """Return a text, or the texts in a list, with their marks."""
    if isinstance(value, list):
        return [marked(each) for each in value]
    return Marked(value, owners(value)) if isinstance(value, str) else value


def method(name: str, *fixed: Any) -> Callable[..., Any]:
    return lambda text, *values: getattr(text, name)(*values, *fixed)


EXACT: Final[dict[str, tuple[Callable[..., Any], tuple[st.SearchStrategy[Any], ...]]]] = {
    "str": (str, ()),
    "list": (list, ()),
    "reversed": (lambda text: list(reversed(text)), ()),
    "+": (lambda text, other: text + other, (TEXT,)),
    "* number": (lambda text, times: text * times, (st.integers(-1, 3),)),
    "number *": (lambda text, times: times * text, (st.integers(-1, 3),)),
    "[number]": (lambda text, index: text[index % len(text)] if text else text, (NUMBER,)),
    "[slice]": (
        lambda text, start, stop, step: text[start : stop : step or None],
        (BOUND, BOUND, BOUND),
    ),
    **{name: (method(name), ()) for name in ("upper", "lower", "casefold", "swapcase")},
    **{name: (method(name, "-"), (NUMBER,)) for name in ("center", "ljust", "rjust")},
    **{name: (method(name), (NUMBER,)) for name in ("zfill", "expandtabs")},
    **{name: (method(name), (SHORT,)) for name in ("removeprefix", "removesuffix", "partition", "rpartition")},
    **{name: (method(name), (st.none() | SHORT,)) for name in ("strip", "lstrip", "rstrip")},
    **{name: (method(name), (st.none() | SHORT, st.integers(-1, 3))) for name in ("split", "rsplit")},
    "splitlines": (method("splitlines"), (st.booleans(),)),
    "replace": (method("replace"), (st.text("ab ", max_size=2), TEXT, st.integers(-1, 4))),
    "join": (method("join"), (st.lists(TEXT, max_size=4),)),
    "translate": (method("translate", TABLE), ()),
    "%s": (lambda text, other, count: type(text)("x%%-%sy%d-%s") % (other, count, text), (TEXT, NUMBER)),
    "format": (lambda text, other: type(text)("x{}}}-{{{0}{1}").replace("{}", "{1}").format(text, other), (TEXT,)),
    "format_map": (lambda text, other: type(text)("{t}-{o!s}").format_map({"t": text, "o": other}), (TEXT,)),
}
"""What is done with a text, and the other values that it takes. Each character keeps its own mark."""
COARSE: Final[dict[str, tuple[Callable[..., Any], tuple[st.SearchStrategy[Any], ...]]]] = {
    **{name: (method(name), ()) for name in ("title", "capitalize")},
    "%r": (lambda text, other: type(text)("x%r %5.3s") % (other, text), (TEXT,)),
    "%(name)s": (lambda text, other: type(text)("x%(a)s%(b)s") % {"a": other, "b": text}, (TEXT,)),
    "% list": (lambda text, other: type(text)("x%s") % [text, {other: [text]}], (TEXT,)),
    "format of a width": (lambda text, other: type(text)("{0:>7}{1:x^{2}}").format(text, other, 9), (TEXT,)),
    "format of an item": (lambda text, other: type(text)("{0[0]}{1!r}").format([text], other), (TEXT,)),
}
"""The same, where the greatest mark may go to other characters as well."""


@pytest.mark.parametrize("name", [*EXACT, *COARSE])
def test_a_method_gives_the_text_of_str_with_marks(name: str) -> None:
    call, others = (EXACT | COARSE)[name]

    @given(TEXT, st.tuples(*others))
    def check(text: str, values: Sequence[Any]) -> None:
        if name in COARSE:  # repr would escape the other characters, with letters of other owners
            text, *values = ("".join(filter(str.isprintable, each)) for each in (text, *values))
        expected, got = call(text, *values), call(marked(text), *map(marked, values))
        assert got == expected
        for plain, found in [(expected, got)] if isinstance(got, str) else zip(expected, got, strict=True):
            assert str.__eq__(found, plain)
            assert type(found) is Marked
            assert len(found.marks) == len(plain)
            if name in EXACT:
                assert found.marks == owners(plain)
            else:
                assert USER not in {
                    owner for mark, owner in zip(found.marks, owners(plain), strict=True) if mark < USER
                }

    check()


@given(TEXT, TEXT)
def test_plain_text_is_the_templates(text: str, other: str) -> None:
    mine = Marked(text, USER)
    assert (other + mine).marks == bytes(len(other)) + mine.marks
    assert (mine + other).marks == mine.marks + bytes(len(other))
    assert (mine % ()).marks == mine.marks if "%" not in text else True
    assert mine.join([other, other]).marks == bytes(len(other)) + mine.marks + bytes(len(other))
    assert mine.replace("a", "xy").count("a") == 0
    assert marks_of(other) == bytes(len(other))


@given(TEXT)
def test_it_compares_hashes_and_copies_as_its_text(text: str) -> None:
    mine = marked(text)
    assert mine == text
    assert text == mine
    assert hash(mine) == hash(text)
    assert {text: 1}[mine] == 1
    assert repr(mine) == repr(text)
    for made in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine), Marked(mine)):
        assert type(made) is Marked
        assert (made, made.marks) == (text, mine.marks)


def test_the_greatest_mark_of_containers() -> None:
    shared: list[Any] = [Marked("a", MODEL)]
    for _ in range(200):
        shared = [shared, shared]  # 2**200 paths lead to it
    assert greatest(shared, 5, None, "x") == MODEL
    assert greatest({Marked("key", USER): 1}, shared) == USER
    assert greatest({"key": (Marked("", USER), Marked("a"))}) == TEMPLATE


def test_wrong_marks_and_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 marks, got 2"):
        Marked("abc", b"\0\0")
    with pytest.raises(TypeError):
        Marked("a") + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        1 + Marked("a")  # type: ignore[operator]
    with pytest.raises(TypeError):
        Marked("%s") % ()
    with pytest.raises(TypeError):
        Marked("%s") % ("a", "b")
    with pytest.raises(IndexError):
        Marked("a")[1]
    with pytest.raises(ValueError, match="substring not found"):
        Marked("a", USER).index("b")
