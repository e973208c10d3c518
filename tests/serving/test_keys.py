"""The certificate authority: what it makes, who accepts it, who doesn't, and what interruptions leave."""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
import stat
import subprocess
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from splitbundle import BundleError
from splitbundle.remote.tls_files import fingerprint_of, read_identity
from splitbundle.serving import keys
from splitbundle.serving.revoked import RevokedCertificates, read_revoked
from tests.support.certificates import other_signature, shake_hands


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a server and two clients, for tests that change nothing."""
    root = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(root)
    keys.server(root, "trunk.example", "localhost", "10.0.0.7", "::1")
    keys.client(root, "alice")
    keys.client(root, "bob")
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "keys"))


def loaded(place: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((place / "cert.pem").read_bytes())


def snapshot(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# What is made.


def test_what_lies_in_the_directory(made: Path) -> None:
    assert {path for path in snapshot(made) if not path.startswith("issued/")} == {
        *("ca.pem", "ca.key", "revoked.json"),
        *(f"servers/trunk.example/{name}" for name in ("ca.pem", "cert.pem", "key.pem", "revoked.json")),
        *(f"clients/{who}/{name}" for who in ("alice", "bob") for name in ("ca.pem", "cert.pem", "key.pem")),
    }
    modes = {path.relative_to(made).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*")}
    secret = {name: mode for name, mode in modes.items() if name.endswith("key.pem") or name == "ca.key"}
    assert set(secret.values()) == {0o600}
    assert len(secret) == 4
    assert stat.S_IMODE(made.stat().st_mode) == modes["clients/alice"] == modes["servers/trunk.example"] == 0o700
    # The private key of the authority is in no other file.
    authority = (made / "ca.key").read_bytes()
    assert [name for name, data in snapshot(made).items() if authority in data] == ["ca.key"]
    issued = {each.fingerprint for each in keys.listing(made)}
    assert {path.stem for path in (made / "issued").iterdir()} == issued


def test_what_certificates_say(made: Path) -> None:
    authority = x509.load_pem_x509_certificate((made / "ca.pem").read_bytes())
    server, client = loaded(made / "servers" / "trunk.example"), loaded(made / "clients" / "alice")
    hour = datetime.timedelta(hours=1)
    spans = [each.not_valid_after_utc - each.not_valid_before_utc for each in (authority, server, client)]
    assert spans[0] == datetime.timedelta(days=3650) + hour
    assert spans[1:] == [datetime.timedelta(days=397) + hour] * 2
    for certificate, usage in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (client, ExtendedKeyUsageOID.CLIENT_AUTH)):
        certificate.verify_directly_issued_by(authority)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        assert (constraints.critical, constraints.value.ca) == (True, False)
        use = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (use.digital_signature, use.key_cert_sign, use.crl_sign) == (True, False, False)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["trunk.example", "localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]
    assert client.subject.rfc4514_string() == "CN=alice"
    use = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (use.digital_signature, use.key_cert_sign) == (False, True)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    numbers = {each.serial_number for each in (authority, server, client)}
    assert len(numbers) == 3


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl isn't installed")
def test_openssl_takes_them(made: Path, tmp_path: Path) -> None:
    """Another program checks the chain, and computes a fingerprint as docs/guides/keys.md says."""
    for purpose, place in (("sslserver", "servers/trunk.example"), ("sslclient", "clients/alice")):
        verify = ["openssl", "verify", "-x509_strict", "-CAfile", "ca.pem", "-purpose"]
        for wanted in ("sslserver", "sslclient"):
            done = subprocess.run([*verify, wanted, f"{place}/cert.pem"], cwd=made, capture_output=True, text=True)
            assert (done.returncode == 0) == (wanted == purpose), done.stderr
    place = made / "clients" / "alice" / "cert.pem"
    parse = ["openssl", "asn1parse", "-in", str(place), "-strparse", "4", "-noout", "-out", "signed.der"]
    subprocess.run(parse, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(["openssl", "dgst", "-sha256", "signed.der"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-1] == fingerprint_of(place.read_bytes())


def test_directories_of_machines_can_be_read(made: Path) -> None:
    for place in (*(made / "clients").iterdir(), *(made / "servers").iterdir()):
        identity = read_identity(place)
        assert identity.ca == (made / "ca.pem").read_bytes()
        assert identity.certificate == (place / "cert.pem").read_bytes()
        assert identity.key == (place / "key.pem").read_bytes()


def test_a_certificate_ends_with_its_authority(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = x509.load_pem_x509_certificate((root / "ca.pem").read_bytes()).not_valid_after_utc
    assert keys.client(root, "eve", days=3).expires < keys.client(root, "mallory").expires < end
    monkeypatch.setattr(keys, "_now", lambda: end - datetime.timedelta(days=5))
    late = keys.client(root, "late")
    assert late.expires == end
    assert not keys.has_ended(late)
    monkeypatch.setattr(keys, "_now", lambda: end)
    assert keys.has_ended(late)
    with pytest.raises(BundleError, match=r"\[keys\.directory\].*expected an authority that is valid"):
        keys.client(root, "later")


def test_a_long_host_name(root: Path) -> None:
    """A common name has at most 64 characters, and a host name may have more."""
    host = ".".join(["a" * 60] * 3)
    found = keys.server(root, host)
    assert (found.name, found.hosts, found.path) == (host, (host,), root / "servers" / host)
    keys.rotate(root, host)
    shake_hands(root / "servers" / host, root / "clients" / "alice", host)


# Who accepts whom: the standard library (OpenSSL) and grpc (BoringSSL).


@pytest.mark.parametrize("host", ["trunk.example", "localhost", "10.0.0.7", "::1"])
def test_a_handshake(host: str, made: Path) -> None:
    server, client = made / "servers" / "trunk.example", made / "clients" / "alice"
    shown = shake_hands(server, client, host)
    assert [fingerprint_of(each) for each in shown] == [
        fingerprint_of((place / "cert.pem").read_bytes()) for place in (server, client)
    ]


def test_handshakes_that_fail(made: Path, tmp_path: Path) -> None:
    server, client = made / "servers" / "trunk.example", made / "clients" / "alice"
    keys.init(tmp_path / "other")
    stranger = keys.client(tmp_path / "other", "alice").path
    assert stranger is not None
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(server, client, "trunk.example", ca=tmp_path / "other" / "ca.pem")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(server, stranger, "trunk.example", ca=made / "ca.pem")
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        shake_hands(server, server, "trunk.example")
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        shake_hands(client, client, "trunk.example")
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        shake_hands(server, client, "top.example")
    with pytest.raises(ssl.SSLError, match="IP address mismatch"):
        shake_hands(server, client, "10.0.0.8")


@contextmanager
def grpc_server(directory: Path) -> Iterator[str]:
    """Serve with mutual TLS. The one method returns the fingerprint of the client's certificate."""
    import grpc

    def who(request: bytes, context: grpc.ServicerContext) -> bytes:
        return fingerprint_of(context.auth_context()["x509_pem_cert"][0]).encode()

    files = read_identity(directory)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    handler = grpc.method_handlers_generic_handler("test", {"who": grpc.unary_unary_rpc_method_handler(who)})
    server.add_generic_rpc_handlers((handler,))
    credentials = grpc.ssl_server_credentials([(files.key, files.certificate)], files.ca, require_client_auth=True)
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(None).wait()


def ask(address: str, directory: Path, *, certificate: bytes | None = None, ca: bytes | None = None) -> str:
    """Ask a server whom it sees.

    Raises:
        ConnectionError: one side refuses the other.
    """
    import grpc

    files = read_identity(directory)
    credentials = grpc.ssl_channel_credentials(ca or files.ca, files.key, certificate or files.certificate)
    with grpc.secure_channel(address, credentials) as channel:
        try:
            answer: bytes = channel.unary_unary("/test/who")(b"", timeout=20)
        except grpc.RpcError as error:
            raise ConnectionError(error.code().name) from error
    return answer.decode()


def test_grpc(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("grpc")
    server, client = made / "servers" / "trunk.example", made / "clients" / "alice"
    keys.init(tmp_path / "other")
    stranger = keys.client(tmp_path / "other", "alice").path
    keys.server(tmp_path / "other", "localhost")
    assert stranger is not None
    with grpc_server(server) as address:
        own = (client / "cert.pem").read_bytes()
        assert ask(address, client) == fingerprint_of(own)
        # BoringSSL takes the second form of the signature, too. It is the same certificate to us.
        assert ask(address, client, certificate=other_signature(own)) == fingerprint_of(own)
        with pytest.raises(ConnectionError, match="UNAVAILABLE"):
            ask(address, stranger, ca=(made / "ca.pem").read_bytes())
        with pytest.raises(ConnectionError, match="UNAVAILABLE"):
            ask(address, server)
        with pytest.raises(ConnectionError, match="UNAVAILABLE"):
            ask(address, client, ca=(tmp_path / "other" / "ca.pem").read_bytes())
        with pytest.raises(ConnectionError, match="UNAVAILABLE"):  # the certificate isn't for this address
            ask(address.replace("localhost", "127.0.0.1"), client)
        assert ask(address, client) == fingerprint_of(own)


# Rotation.


@pytest.mark.parametrize(("name", "place"), [("alice", "clients/alice"), ("Trunk.example", "servers/trunk.example")])
def test_rotation(name: str, place: str, root: Path) -> None:
    keys.revoke(root, "bob")
    before, new_files = snapshot(root / place), snapshot(root)
    old = loaded(root / place)
    shutil.copytree(root / place, root.parent / "old")
    found = keys.rotate(root, name, days=7)
    assert found.path == root / place
    after = snapshot(root / place)
    assert {path for path in after if after[path] != before[path]} == {"cert.pem", "key.pem"}
    assert stat.S_IMODE((root / place).stat().st_mode) == 0o700
    assert stat.S_IMODE((root / place / "key.pem").stat().st_mode) == 0o600
    assert set(snapshot(root)) - set(new_files) == {f"issued/{found.fingerprint}.pem"}
    new = loaded(root / place)
    assert new.public_key() != old.public_key()
    assert new.subject == old.subject
    for kind in (x509.SubjectAlternativeName, x509.ExtendedKeyUsage):
        both = [[each.value for each in one.extensions if isinstance(each.value, kind)] for one in (old, new)]
        assert both[0] == both[1]
    # The old one is still good.
    for each in (root.parent / "old", root / place):
        server, client = (
            (each, root / "clients" / "alice") if "servers" in place else (root / "servers/trunk.example", each)
        )
        shake_hands(server, client, "trunk.example")
    paths = [each.path for each in keys.listing(root) if each.name == found.name]
    assert set(paths) == {None, root / place}


def test_rotation_keeps_the_files_of_others(root: Path) -> None:
    (root / "clients" / "alice" / "notes.txt").write_text("mine")
    before = snapshot(root / "clients")
    with pytest.raises(BundleError) as caught:
        keys.rotate(root, "alice")
    assert caught.value.codes == ("output.exists",)
    assert snapshot(root / "clients") == before


def test_an_interrupted_rotation_leaves_a_whole_pair(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, the directory has a key and its certificate, and every certificate has a record."""
    place = root / "clients" / "alice"
    calls = 0

    class Stop(Exception):
        pass

    def stop_at(step: int, function: object) -> object:
        def step_or_stop(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Stop
            return function(*arguments, **options)  # type: ignore[operator]

        return step_or_stop

    for step in range(1, 100):
        calls = 0
        with monkeypatch.context() as patched:
            for name in ("open", "fsync", "mkdir", "chmod"):
                patched.setattr(os, name, stop_at(step, getattr(os, name)))
            try:
                keys.rotate(root, "alice")
            except Stop:
                stopped = True
            else:
                stopped = False
        assert read_identity(place).key is not None
        recorded = {path.stem for path in (root / "issued").glob("*.pem")}
        assert fingerprint_of((place / "cert.pem").read_bytes()) in recorded
        if not stopped:
            break
    assert step > 10
    keys.rotate(root, "alice")
    assert [path.name for path in (root / "clients").iterdir() if path.name.startswith(".")] == []


# Revocation.


def test_revocation(root: Path) -> None:
    old = (root / "clients" / "alice" / "cert.pem").read_bytes()
    keys.rotate(root, "alice")
    new = (root / "clients" / "alice" / "cert.pem").read_bytes()
    server = root / "servers" / "trunk.example"
    watching = RevokedCertificates(server)
    assert not watching.has(old)
    done = keys.revoke(root, "alice")
    assert {each.fingerprint for each in done.certificates} == {fingerprint_of(old), fingerprint_of(new)}
    assert all(each.revoked for each in done.certificates)
    assert done.lists == (root / "revoked.json", server / "revoked.json")
    assert watching.has(old)
    assert watching.has(new)
    assert watching.has(other_signature(new))
    assert not watching.has((root / "clients" / "bob" / "cert.pem").read_bytes())
    assert {each.name for each in keys.listing(root) if each.revoked} == {"alice"}
    # A new certificate for the same name is good again, and a later server has the list.
    fresh = keys.rotate(root, "alice")
    assert not watching.has((root / "clients" / "alice" / "cert.pem").read_bytes())
    later = keys.server(root, "late.example").path
    assert later is not None
    assert read_revoked(later) == read_revoked(root) == read_revoked(server)
    assert len(read_revoked(root)) == 2
    keys.rotate(root, "trunk.example")
    assert read_revoked(server) == read_revoked(root)
    keys.revoke(root, "bob")
    keys.revoke(root, "alice")
    assert read_revoked(later)[-1] == fresh.fingerprint
    assert len(read_revoked(later)) == 4
    assert all(each.revoked == (each.kind == "client") for each in keys.listing(root))


def test_revocation_without_directory_or_record(root: Path) -> None:
    """The client's directory was moved to its machine; or the records are lost."""
    fingerprint = fingerprint_of((root / "clients" / "alice" / "cert.pem").read_bytes())
    shutil.rmtree(root / "clients" / "alice")
    shutil.rmtree(root / "issued")
    with pytest.raises(BundleError, match="got 'alice'"):
        keys.revoke(root, "alice")
    keys.revoke(root, "bob")
    shutil.copytree(root / "servers", root.parent / "servers")
    assert fingerprint not in read_revoked(root)
    keys.client(root, "alice")
    moved = shutil.move(root / "clients" / "alice", root.parent / "alice")
    keys.revoke(root, "alice")
    assert fingerprint_of((Path(moved) / "cert.pem").read_bytes()) in read_revoked(root)


def test_a_revocation_again_writes_every_list(root: Path) -> None:
    keys.revoke(root, "alice")
    place = root / "servers" / "trunk.example" / "revoked.json"
    whole = place.read_bytes()
    place.write_text("{")  # an interrupted copy
    keys.revoke(root, "alice")
    assert place.read_bytes() == whole == (root / "revoked.json").read_bytes()


def test_revocations_at_once_lose_nothing(root: Path) -> None:
    names = [f"client-{i}" for i in range(8)]
    for name in names:
        keys.client(root, name)
    threads = [Thread(target=keys.revoke, args=(root, name)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.name for each in keys.listing(root) if each.revoked} == set(names)


# What is refused.


def test_what_stands_where_an_authority_is_to_be(root: Path, tmp_path: Path) -> None:
    before = snapshot(root)
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for place in (root, tmp_path / "file", tmp_path / "full", tmp_path / "link"):
        with pytest.raises(BundleError) as caught:
            keys.init(place)
        assert caught.value.codes == ("keys.directory",)
    assert snapshot(root) == before
    keys.init(tmp_path / "empty")
    assert keys.listing(tmp_path / "empty") == ()


@pytest.mark.parametrize("missing", ["ca.pem", "ca.key", "revoked.json"])
def test_what_is_no_authority(missing: str, root: Path) -> None:
    (root / missing).unlink()
    before = snapshot(root)
    for call in (keys.server, keys.client, keys.rotate, keys.revoke):
        with pytest.raises(BundleError) as caught:
            call(root, "alice")
        assert caught.value.codes == ("keys.directory",)
        assert missing in str(caught.value)
    with pytest.raises(BundleError, match=r"\[keys\.directory\]"):
        keys.listing(root)
    assert snapshot(root) == before


def test_a_key_of_an_authority_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    place, good = root / "ca.key", (root / "ca.key").read_bytes()
    keys.init(tmp_path / "other")
    for data, said in (
        ((tmp_path / "other" / "ca.key").read_bytes(), "the private key of ca.pem"),
        (b"junk", "a private key in PEM, got another file"),
        ((root / "ca.pem").read_bytes(), "a private key in PEM, got a certificate"),
        (good.replace(b"A", b"B"), r"\[keys\.file\]"),
    ):
        place.write_bytes(data)
        with pytest.raises(BundleError, match=said) as caught:
            keys.client(root, "eve")
        assert caught.value.codes == ("keys.file",)
    place.write_bytes(good)
    place.chmod(0o640)
    with pytest.raises(BundleError, match=r"got mode 0640\. chmod 600") as caught:
        keys.client(root, "eve")
    place.chmod(0o600)
    assert not (root / "clients" / "eve").exists()
    keys.client(root, "eve")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "a b", "a\n", "\0", "é", "a.", "a" * 65, "../bob"]
)
def test_names_of_clients(name: str, root: Path) -> None:
    before = snapshot(root)
    with pytest.raises(BundleError) as caught:
        keys.client(root, name)
    assert caught.value.codes == ("input.value",)
    for call in (keys.rotate, keys.revoke):
        with pytest.raises(BundleError) as caught:
            call(root, name)
        assert caught.value.codes == ("input.value",)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "host",
    [
        *("", ".", "a..b", "a.", "-a", "a-", "a/b", "../x", "a:80", "[::1]", "*.example", "é.example", "a b", "a\0"),
        *("10.0.0.256", "1.2.3", "7", "fe80::1%eth0", "a" * 64, ".".join(["a" * 50] * 6), "a@b", "https://a"),
    ],
)
def test_names_of_hosts(host: str, made: Path) -> None:
    before = snapshot(made)
    for hosts in ((host,), ("good.example", host)):
        with pytest.raises(BundleError) as caught:
            keys.server(made, *hosts)
        assert caught.value.codes == ("input.value",)
    assert snapshot(made) == before


def test_addresses_name_directories(root: Path) -> None:
    found = keys.server(root, "2001:db8::7", "2001:0db8:0:0::7", "A.example")
    assert found.hosts == ("2001:db8::7", "a.example")
    assert found.path == root / "servers" / "2001-0db8-0000-0000-0000-0000-0000-0007"
    assert keys.rotate(root, "2001:db8::7").hosts == found.hosts
    shake_hands(found.path, root / "clients" / "alice", "2001:db8::7")


@pytest.mark.parametrize(("make", "name"), [("client", "alice"), ("client", "trunk.example"), ("server", "alice")])
def test_a_name_is_taken_once(make: str, name: str, made: Path) -> None:
    """Not by a server and a client together, too: rotate takes either."""
    before = snapshot(made)
    with pytest.raises(BundleError, match="keys rotate") as caught:
        getattr(keys, make)(made, name)
    assert caught.value.codes == ("output.exists",)
    assert snapshot(made) == before


@pytest.mark.parametrize("days", [0, -1, 3651, float("nan")])
def test_days_out_of_range(days: int, made: Path) -> None:
    with pytest.raises(BundleError, match=r"\[input\.value\] days: expected a number from 1 to 3650"):
        keys.client(made, "eve", days=days)


def test_servers_are_not_revoked(made: Path) -> None:
    """No client has a list of revoked servers, so this would promise too much."""
    with pytest.raises(BundleError, match="expected the name of a client, got a server"):
        keys.revoke(made, "trunk.example")


def test_damaged_records_are_reported(root: Path) -> None:
    """A revocation that leaves out what it can't read would be believed to be whole."""
    next((root / "issued").iterdir()).write_text("junk")
    for call in (lambda: keys.revoke(root, "alice"), lambda: keys.listing(root)):
        with pytest.raises(BundleError) as caught:
            call()
        assert caught.value.codes == ("keys.file",)
    (root / "revoked.json").write_text("{}")
    with pytest.raises(BundleError) as caught:
        keys.revoke(root, "alice")
    assert set(caught.value.codes) == {"field.missing"}
