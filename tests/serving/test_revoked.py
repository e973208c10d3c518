"""The list of revoked certificates: read again when it changes, and kept when it can't be read."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest

from splitbundle import BundleError
from splitbundle.format.revoked_certificates import make_revoked
from splitbundle.remote.tls_files import fingerprint_of
from splitbundle.serving import keys
from splitbundle.serving.revoked import RevokedCertificates
from tests.support.certificates import other_signature


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Two certificates in PEM."""
    root = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(root)
    paths = [keys.client(root, name).path for name in ("alice", "bob")]
    one, other = [(path / "cert.pem").read_bytes() for path in paths if path is not None]
    return one, other


def write(directory: Path, *certificates: bytes) -> None:
    (directory / "revoked.json").write_bytes(make_revoked([fingerprint_of(each) for each in certificates]))


def test_what_is_revoked(tmp_path: Path, certificates: tuple[bytes, bytes]) -> None:
    alice, bob = certificates
    write(tmp_path, alice)
    revoked = RevokedCertificates(tmp_path)
    der = ssl.PEM_cert_to_DER_cert(alice.decode())
    for form in (alice, alice.decode(), der, other_signature(alice), b"\n" + alice + bob):
        assert revoked.has(form)
    assert not revoked.has(bob)
    for junk in (b"", b"junk", der[:-1], der + b"\0", alice.replace(b"CERTIFICATE", b"PRIVATE KEY")):
        with pytest.raises(BundleError) as caught:
            revoked.has(junk)
        assert caught.value.codes == ("keys.file",)


def test_without_the_file_none_is_revoked(tmp_path: Path, certificates: tuple[bytes, bytes]) -> None:
    told: list[str] = []
    revoked = RevokedCertificates(tmp_path, log=told.append)
    assert not any(map(revoked.has, certificates))
    write(tmp_path, certificates[0])
    assert [revoked.has(each) for each in certificates] == [True, False]
    assert told == []


def test_a_change_is_seen(tmp_path: Path, certificates: tuple[bytes, bytes]) -> None:
    alice, bob = certificates
    place = tmp_path / "revoked.json"
    write(tmp_path, alice)
    revoked = RevokedCertificates(tmp_path)
    was = place.stat()
    # Another file of the same size and time.
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", bob)
    os.utime(tmp_path / "new" / "revoked.json", ns=(was.st_atime_ns, was.st_mtime_ns))
    (tmp_path / "new" / "revoked.json").replace(place)
    assert (place.stat().st_size, place.stat().st_mtime_ns) == (was.st_size, was.st_mtime_ns)
    assert [revoked.has(each) for each in certificates] == [False, True]
    # The same file, written again in place.
    with place.open("r+b") as file:
        file.write(make_revoked([fingerprint_of(alice)]))
    os.utime(place, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    assert [revoked.has(each) for each in certificates] == [True, False]
    write(tmp_path, *certificates)
    assert all(map(revoked.has, certificates))
    write(tmp_path)
    assert not any(map(revoked.has, certificates))


def test_it_is_read_once_as_long_as_it_stays(
    tmp_path: Path, certificates: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, certificates[0])
    revoked = RevokedCertificates(tmp_path)
    monkeypatch.setattr("splitbundle.serving.revoked.read_revoked", None)
    assert revoked.has(certificates[0])


@pytest.mark.parametrize("change", ["junk", "cut", "gone", "link", "directory", "version", "large"])
def test_the_last_good_list_stays(change: str, tmp_path: Path, certificates: tuple[bytes, bytes]) -> None:
    """A damaged file must never mean that everybody is welcome."""
    alice, bob = certificates
    place = tmp_path / "revoked.json"
    write(tmp_path, alice)
    told: list[str] = []
    revoked = RevokedCertificates(tmp_path, log=told.append)
    good = place.read_bytes()
    place.unlink()
    if change == "link":
        (tmp_path / "other.json").write_bytes(make_revoked([]))
        place.symlink_to("other.json")
    elif change == "directory":
        place.mkdir()
    elif change == "large":
        with place.open("wb") as file:
            file.truncate(2**30)
    elif change != "gone":
        place.write_bytes({"junk": b"x", "cut": good[:-3], "version": good.replace(b": 1,", b": 2,")}[change])
    for _ in range(3):
        assert [revoked.has(each) for each in certificates] == [True, False]
    assert len(told) == 1
    assert str(place) in told[0]
    if change != "gone":
        with pytest.raises(BundleError, match=r"revoked\.json"):
            RevokedCertificates(tmp_path)
    if change == "directory":
        place.rmdir()
    else:
        place.unlink(missing_ok=True)
    write(tmp_path, bob)
    assert [revoked.has(each) for each in certificates] == [False, True]
    place.write_text("damaged again")
    assert [revoked.has(each) for each in certificates] == [False, True]
    assert len(told) == 2
    assert "json.syntax" in told[1]


def test_a_file_that_the_system_refuses_for_a_moment(
    tmp_path: Path, certificates: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file doesn't change when it can be read again, and it is read all the same."""
    alice, bob = certificates
    write(tmp_path, alice)
    told: list[str] = []
    revoked = RevokedCertificates(tmp_path, log=told.append)
    write(tmp_path, alice, bob)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        for _ in range(3):
            assert [revoked.has(each) for each in certificates] == [True, False]
    assert len(told) == 1
    assert "Too many open files" in told[0]
    assert all(map(revoked.has, certificates))


def test_servers_keep_their_lists_with_an_authority(tmp_path: Path) -> None:
    keys.init(tmp_path / "keys")
    server = keys.server(tmp_path / "keys", "trunk.example").path
    client = keys.client(tmp_path / "keys", "alice").path
    assert server is not None
    assert client is not None
    shutil.copytree(server, tmp_path / "elsewhere")
    revoked = RevokedCertificates(tmp_path / "elsewhere")
    certificate = (client / "cert.pem").read_bytes()
    assert not revoked.has(certificate)
    (_, new) = keys.revoke(tmp_path / "keys", "alice").lists
    shutil.copy(new, tmp_path / "elsewhere" / "revoked.json")
    assert revoked.has(certificate)
