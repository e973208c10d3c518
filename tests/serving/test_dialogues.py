"""The dialogues of the protocol: requests, and what a server answers to each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from splitbundle.records import as_dict
from splitbundle.wire import frames, headers
from splitbundle.wire.messages import ANSWERS, KINDS, Failure
from tests.support import stand_in_stage
from tests.support.paths import TESTS

HERE = TESTS / "conformance" / "wire" / "dialogues"
DIALOGUES = [pytest.param(json.loads(path.read_text("utf-8")), id=path.stem) for path in sorted(HERE.glob("*.json"))]


def named(value: Any, names: dict[str, str]) -> Any:
    """Return a request with the ids of earlier answers in place of their names."""
    return {key: names[each] if isinstance(each, str) and each[:1] == "$" else each for key, each in value.items()}


def compare(found: dict[str, Any], expected: dict[str, Any], names: dict[str, str], where: str) -> None:
    for key, each in expected.items():
        if isinstance(each, str) and each[:1] == "$":
            names[each] = found[key]
        else:
            assert found[key] == each, (where, key)


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_a_server_answers_as_the_dialogue_says(dialogue: dict[str, Any]) -> None:
    service, served, clock = stand_in_stage.service(trains=dialogue["trainable"])
    names: dict[str, str] = {}
    frame, answer, owner = b"", b"", ""
    for number, step in enumerate(dialogue["steps"]):
        where = f"step {number}: {step.get('about', '')}"
        if "wait" in step:
            clock.now += step["wait"]
        elif "drain" in step:
            service.drain()
        elif "again" in step:
            assert service.answer(frame, owner) == answer, where
        else:
            owner = step.get("owner", "alice")
            if "frame" in step:
                frame = bytes.fromhex(step["frame"])
            else:
                header = json.dumps(named(step["request"], names)).encode()
                payload = stand_in_stage.packed(step.get("numbers", []))
                frame = frames.MAGIC + len(header).to_bytes(4, "little") + header + payload
            answer = service.answer(frame, owner)
            message, rest = frames.unpack(answer)
            found = json.loads(json.dumps({"op": message.op, **as_dict(message)}))
            compare(found, step["answer"], names, where)
            if "result" in step:
                assert bytes(rest) == stand_in_stage.packed(step["result"]), where
            if isinstance(message, Failure):
                assert set(found) == {"op", "code", "expected", "got", "argument", "retry"}
            else:
                asked = KINDS[step["request"]["op"]]
                assert type(message) is ANSWERS[asked], where  # type: ignore[index]
        if "calls" in step:
            assert served.calls == step["calls"], where
    service.stop()
    assert (len(service.sessions), service.sessions.slots) == (0, 0)


def test_every_request_and_every_retry_is_in_a_dialogue() -> None:
    steps = [step for param in DIALOGUES for step in param.values[0]["steps"]]
    assert {step["request"]["op"] for step in steps if "request" in step} >= {kind.op for kind in ANSWERS}
    assert {step["answer"].get("retry") for step in steps if "answer" in step} >= set(headers.RETRIES)
