"""Random changes of frames: a reader refuses or takes them, and a server answers them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitbundle.errors import BundleError
from splitbundle.wire import frames, headers
from splitbundle.wire.messages import ANSWERS, Failure
from tests.support import stand_in_stage
from tests.support.fuzzing import wire_seeds

FRAMES = sorted({frame for frame in wire_seeds("frame").values() if len(frame) < 4096})
HEADERS = [json.loads(line) for text in wire_seeds("service").values() for line in text.decode().splitlines()]
NUMBERS = st.one_of(st.integers(-2, 5), st.sampled_from([2**20, 2**31 - 1, 2**31, 2**53 - 1]), st.floats())
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.text(max_size=40), st.sampled_from(["float32", "int8", "$session"])
    ),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_frames(draw: st.DrawFn) -> bytes:
    """A frame with some bytes changed, removed, added or cut."""
    data = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "remove", "add", "cut", "length"]))
        if kind == "change" and place < len(data):
            data[place] = draw(st.integers(0, 255))
        elif kind == "remove":
            del data[place : place + draw(st.integers(1, 20))]
        elif kind == "add":
            data[place:place] = draw(st.binary(max_size=20))
        elif kind == "cut":
            del data[place:]
        elif len(data) >= 8:
            data[4:8] = draw(st.integers(0, 2**32 - 1)).to_bytes(4, "little")
    return bytes(data)


@st.composite
def changed_headers(draw: st.DrawFn) -> dict[str, Any]:
    """A header with some members replaced, taken away or added."""
    header = dict(draw(st.sampled_from(HEADERS)))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*header, "session", "rows", "order", "capacity", "run", "x"]))
        header[name] = draw(VALUES)
        if draw(st.integers(0, 9)) == 0:
            del header[name]
    return header


@pytest.mark.rule("SB-X-002", "SB-X-026")
@settings(deadline=None, max_examples=400)
@given(changed_frames())
def test_a_changed_frame_is_taken_or_refused(data: bytes) -> None:
    try:
        message, payload = frames.unpack(data)
    except BundleError:
        return
    assert frames.unpack(frames.pack(message, [payload])) == (message, payload)


USUAL = [header for header in HEADERS if header["op"] == "run"] + [
    {
        "op": "ran",
        "number": 3,
        "instance": "0" * 32,
        "tokens": 3,
        "width": 2,
        "encoding": "int8",
        "queued": 0,
        "computed": 1,
    }
]
WHOLE = {
    "op": "run",
    "session": "0123456789abcdef" * 2,
    "number": 1,
    "past": [4],
    "count": [1],
    "sequence": 1,
    "width": 2,
    "encoding": "float32",
    "rows": [0],
    "order": [1, 0],
    "capacity": 8,
}
FORMS = ["%s", " %s", "%s ", "%s\n", "%s\0", "\ufeff%s", "[%s]", "%s,"]


@pytest.mark.rule("SB-X-002", "SB-X-004")
@settings(deadline=None, max_examples=400)
@given(st.data())
def test_the_fast_way_of_reading_takes_nothing_else(data: st.DataObject) -> None:
    """Headers of steps are read in two ways. What the fast one takes, the strict one takes alike."""
    header = dict(data.draw(st.sampled_from(USUAL)))
    if header.get("session"):
        header["session"] = "0123456789abcdef" * 2
    if data.draw(st.booleans()):
        header[data.draw(st.sampled_from([*header, "rows", "order", "capacity", "x"]))] = data.draw(VALUES)
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = data.draw(st.sampled_from(FORMS)) % json.dumps(header, separators=separators)
    if data.draw(st.booleans()):
        text = text.replace(
            *data.draw(st.sampled_from([("1", "1.0"), ("0", "-0"), ("[", "[["), ('"run"', '"r\\u0075n"')]))
        )
    if data.draw(st.booleans()):
        text = text.replace("{", '{"number":1,', 1)
    encoded = text.encode(data.draw(st.sampled_from(["utf-8", "utf-8", "utf-16"])))
    fast = headers.parse_step(encoded)
    assert fast is None or fast == headers._parse_any(encoded)
    assert headers.parse_step(json.dumps(USUAL[-1], separators=(",", ":")).encode()) is not None


@pytest.mark.rule("SB-X-004", "SB-X-009")
@pytest.mark.parametrize("header", [WHOLE, USUAL[-1]], ids=["run", "ran"])
def test_the_fast_way_has_the_same_borders(header: dict[str, Any]) -> None:
    taken = 0
    for name, value in header.items():
        borders = [power + by for power in (0, 16, 4096, 2**20, 2**28, 2**31, 2**53, 2**60) for by in (-1, 0, 1)]
        for border in (each for each in borders if each >= 0):
            data = json.dumps(header | {name: [border] if type(value) is list else border}, separators=(",", ":"))
            fast = headers.parse_step(data.encode())
            try:
                strict = headers._parse_any(data.encode())
            except BundleError:
                strict = None
            assert fast == strict, data
            if fast is not None:
                assert headers.dump(fast).decode() == data
                taken += 1
    assert taken > 20


@pytest.mark.rule("SB-X-026")
@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(changed_headers(), changed_frames()), min_size=1, max_size=12))
def test_a_server_answers_whatever_comes(requests: list[dict[str, Any] | bytes]) -> None:
    to, _, clock = stand_in_stage.service()
    ids = {"$s": "0" * 32, "$r": "0" * 32}
    for each in requests:
        if isinstance(each, bytes):
            frame = each
        else:
            known = {name: ids.get(value, value) if isinstance(value, str) else value for name, value in each.items()}
            header = json.dumps(known).encode()
            try:
                size = frames.payload_size(headers.parse(header))
            except BundleError:
                size = 8
            frame = frames.MAGIC + len(header).to_bytes(4, "little") + header + b"\x01" * min(size, 8192)
        answer, _ = frames.unpack(to.answer(frame, "alice"))
        assert isinstance(answer, (Failure, *ANSWERS.values()))
        ids["$s"], ids["$r"] = getattr(answer, "session", ids["$s"]), getattr(answer, "run", ids["$r"])
        clock.now += 5
    slots = sum(session.reserved for session in to.sessions._sessions.values())
    assert to.sessions.slots == slots
    to.stop()
    assert (len(to.sessions), to.sessions.slots, to.sessions._kept_bytes) == (0, 0, 0)
