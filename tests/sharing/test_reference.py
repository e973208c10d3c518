"""The grammar of references."""

from __future__ import annotations

import pytest

from splitbundle.errors import BundleError
from splitbundle.sharing.reference import is_loopback, may_be_plain, parse_reference

ID = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "scheme", "host", "path", "folder", "revision"),
    [
        ("gpt2.splitbundle", "", "", "gpt2.splitbundle", "", None),
        ("/models/a:b@c", "", "", "/models/a:b@c", "", None),
        ("https://example.org/m/x.splitbundle/", "https", "example.org", "m/x.splitbundle", "", None),
        ("https://example.org/m/x.splitbundle/manifest.json", "https", "example.org", "m/x.splitbundle", "", None),
        ("http://[::1]:80/x", "http", "[::1]:80", "x", "", None),
        ("hf://org/name", "hf", "", "org/name", "", None),
        ("hf://models/org/name/a/b@refs/pr/3", "hf", "", "org/name", "a/b", "refs/pr/3"),
        ("oci://ghcr.io/me/gpt2", "oci", "ghcr.io", "me/gpt2", "", None),
        ("oci://localhost:5000/me/gpt2:v1.0", "oci", "localhost:5000", "me/gpt2", "", "v1.0"),
        ("s3://bucket/a/b", "s3", "bucket", "a/b", "", None),
        ("sftp://me@host:22/a", "sftp", "me@host:22", "a", "", None),
    ],
)
def test_forms(text: str, scheme: str, host: str, path: str, folder: str, revision: str | None) -> None:
    for given, pin in ((text, None), (f"{text}@{ID}", ID)):
        found = parse_reference(given)
        assert (found.scheme, found.host, found.path, found.folder) == (scheme, host, path, folder)
        assert (found.revision, found.pin) == (revision, pin)
        again = parse_reference(str(found))
        assert again == found


@pytest.mark.rule("SB-S-001")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "gs://bucket/x",
        "file:///etc/passwd",
        "hf://name",
        "hf://org/name/../x",
        "hf://org/name@",
        "oci://host",
        "oci://host/Name",
        "oci://host/name:",
        "oci://host/name:a b",
        "oci://ho st/name",
        "https://user:secret@host/x",
        "https://host/x?token=1",
        "https://host/x#y",
        "https://host/a/../b",
        "https:///x",
        "https://host/\u00e9",
        "sftp://me:secret@host/x",
        "https://host/x\n",
        "oci://host:99999/x",
        "https://host:0/x",
        "oci://host/x:v1@sha256:abc",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_reference(text)
    assert caught.value.codes == ("usage.reference",)
    assert caught.value.problems[0].hint


def test_a_secret_is_not_repeated() -> None:
    for text in (
        *("https://user:secret@host/x", "oci://user:secret@host/x:y", "sftp://user:secret@host/x"),
        *("https://host/x?token=secret", "https://host/x#secret", "hf://user:secret@host/x"),
    ):
        with pytest.raises(BundleError) as caught:
            parse_reference(text)
        assert "secret" not in str(caught.value)


@pytest.mark.rule("SB-S-006")
def test_plain_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1:5000", "127.3.2.1", "[::1]:80", "LOCALHOST:1")))
    assert not any(map(is_loopback, ("localhost.example.org", "10.0.0.1", "[::2]", "0x7f000001", "127.0.0.1.nip.io")))
    assert not may_be_plain("10.0.0.1:5000")
    monkeypatch.setenv("SPLITBUNDLE_PLAIN_HTTP", "10.0.0.1:5000, nas")
    assert may_be_plain("10.0.0.1:5000")
    assert may_be_plain("nas:8000")
    assert not may_be_plain("10.0.0.1:5001")
