"""The protocol over gRPC, as a client in any language sees it: bytes, statuses and metadata."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from splitbundle.errors import BundleError
from splitbundle.serving.grpc_server import GrpcServer
from splitbundle.wire import frames
from splitbundle.wire.messages import PROTOCOL, Failure, Health, Hello, Welcome
from tests.support.stand_in_stage import LIMITS, service

grpc = pytest.importorskip("grpc")
HELLO = frames.pack(Hello(protocol=PROTOCOL, fingerprint=None, layers=None))
TOKENS = {"alice": "a" * 16, "bob": "b" * 16}
Call = Callable[..., bytes]


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Iterator[Call]:
    """A server of the stand-in stage, and the method of a plain gRPC client."""
    to, _, _ = service()
    owners: list[str] = []

    def answer(data: bytes, owner: str, alive: Callable[[], bool]) -> bytes:
        owners.append(owner)
        return to.answer(data, owner, alive)

    tokens = getattr(request, "param", None)
    server = GrpcServer(answer, "127.0.0.1", 0, max_message=LIMITS.message, tokens=tokens)
    server.start()
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.max_send_message_length", -1)])
    method = channel.unary_unary("/splitbundle.v1.Stage/Call")
    method.owners = owners
    yield method
    channel.close()
    server.stop(0).wait()
    server.close()
    to.stop()


def status(call: Call, *arguments: Any, **options: Any) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, timeout=60, **options)
    return str(raised.value.code().name)


@pytest.mark.rule("SB-X-026")
def test_frames_that_nobody_can_read_are_answered(call: Call) -> None:
    for data in (b"", b"\0" * 100, HELLO[:-1], HELLO + b"\0", frames.pack(Health(), [b"x"])):
        answer, payload = frames.unpack(call(data, timeout=60))
        assert isinstance(answer, Failure)
        assert len(payload) == 0
    assert isinstance(frames.unpack(call(HELLO, timeout=60))[0], Welcome)
    assert set(call.owners) == {"local"}  # type: ignore[attr-defined]


@pytest.mark.rule("SB-X-006")
def test_a_frame_above_the_limit_is_not_read(call: Call) -> None:
    assert status(call, b"x" * (LIMITS.message + 1)) == "RESOURCE_EXHAUSTED"
    assert isinstance(frames.unpack(call(b"x" * LIMITS.message, timeout=60))[0], Failure)
    assert len(call.owners) == 1  # type: ignore[attr-defined]


@pytest.mark.rule("SB-X-027")
@pytest.mark.parametrize("call", [TOKENS], indirect=True)
def test_tokens_name_clients(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    for given in ("", "Bearer ", "Bearer " + "c" * 16, "Bearer " + "a" * 15, "bearer " + "a" * 16, "a" * 16):
        metadata = (("authorization", given),) if given else ()
        assert status(call, HELLO, metadata=metadata) == "UNAUTHENTICATED", given
    assert call.owners == []  # type: ignore[attr-defined]
    for name, token in TOKENS.items():
        compared.clear()
        call(HELLO, timeout=60, metadata=(("authorization", f"Bearer {token}"),))
        assert call.owners[-1] == f"token:{name}"  # type: ignore[attr-defined]
        # All of them, whichever it is: once before the message is read, and once for the name.
        assert len(compared) == 2 * len(TOKENS)


@pytest.mark.rule("SB-X-027")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "localhost.example", ""])  # refused
def test_no_address_of_others_without_tls(host: str) -> None:
    with pytest.raises(BundleError) as raised:
        GrpcServer(lambda data, owner, alive: b"", host, 0, max_message=1)
    assert raised.value.codes == ("server.address",)
