"""Addresses of stage servers."""

from __future__ import annotations

import pytest

from splitbundle.errors import BundleError
from splitbundle.remote.address import is_loopback, parse_address


@pytest.mark.parametrize(
    ("text", "host", "port", "target"),
    [
        ("grpcs://trunk.example:7000", "trunk.example", 7000, "trunk.example:7000"),
        ("grpcs://trunk.example:7000/", "trunk.example", 7000, "trunk.example:7000"),
        ("grpcs://10.0.0.7:1", "10.0.0.7", 1, "10.0.0.7:1"),
        ("grpcs://[2001:db8::7]:65535", "2001:db8::7", 65535, "[2001:db8::7]:65535"),
        ("grpc://127.0.0.1:7000", "127.0.0.1", 7000, "127.0.0.1:7000"),
        ("grpc://[::1]:7000", "::1", 7000, "[::1]:7000"),
        ("grpc://localhost:7000", "localhost", 7000, "localhost:7000"),
    ],
)
def test_an_address(text: str, host: str, port: int, target: str) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.target) == (host, port, target)
    assert address.secure == text.startswith("grpcs")


@pytest.mark.parametrize(
    "text",
    [
        *("", "trunk.example:7000", "http://trunk.example:7000", "grpcs://trunk.example", "grpcs://:7000"),
        *("grpcs://trunk.example:0", "grpcs://trunk.example:65536", "grpcs://trunk.example:999999"),
        *("grpcs://trunk.example:7000/path", "grpcs://user@trunk.example:7000", "grpcs://2001:db8::7:7000"),
        *("grpcs://trunk.example:7000\n", " grpcs://trunk.example:7000", "GRPCS://trunk.example:7000"),
        *("grpcs://a b:7000", "grpcs://trunk.example:٧٠٠٠", "unix:/tmp/x", None, 7, b"grpcs://a:1"),
    ],
)
def test_what_is_no_address(text: object) -> None:
    with pytest.raises(BundleError) as raised:
        parse_address(text, insecure=True)
    assert raised.value.codes == ("input.value",)


@pytest.mark.rule("SB-X-028")
@pytest.mark.parametrize(
    "host",
    [
        "trunk.example",
        "10.0.0.7",
        "0.0.0.0",
        "[::]",
        "[2001:db8::7]",
        "localhost.example",
        "127.0.0.1.example",
        "127.1",
    ],
)
def test_an_address_of_another_machine_needs_tls(host: str) -> None:
    with pytest.raises(BundleError) as raised:
        parse_address(f"grpc://{host}:7000")
    assert raised.value.codes == ("input.value",)
    assert not parse_address(f"grpc://{host}:7000", insecure=True).secure
    assert parse_address(f"grpcs://{host}:7000").secure


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False)],
)
def test_what_a_loopback_address_is(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
