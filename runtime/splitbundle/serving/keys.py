"""A small certificate authority in a directory: certificates for the servers and clients of one group.

``init`` makes the directory, ``server`` and ``client`` give a machine or a person a certificate, and ``revoke`` takes
a client's away::

    DIR/ca.pem                  the certificate of the authority, which every machine has
    DIR/ca.key                  its private key, which never leaves this directory
    DIR/revoked.json            the certificates that servers refuse
    DIR/issued/*.pem            every certificate that was made, under its fingerprint
    DIR/servers/HOST/           ca.pem, cert.pem, key.pem and revoked.json, for one server
    DIR/clients/NAME/           ca.pem, cert.pem and key.pem, for one client

Of the modules for machines, only this one imports ``cryptography``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.format import revoked_certificates
from splitbundle.records import replace
from splitbundle.remote import tls_files
from splitbundle.remote.tls_files import CA, CERTIFICATE, KEY, bad_file, fingerprint_of
from splitbundle.serving import key_names
from splitbundle.serving.key_directories import (
    CA_KEY,
    ISSUED,
    ROOMS,
    Authority,
    Certificate,
    Kind,
    Revocation,
    bad_directory,
    check_authority,
    directories,
    existing,
    is_empty,
    is_identity,
    locked,
    write_key,
)
from splitbundle.serving.revoked import read_revoked
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.atomic_file import atomic_file

DAYS: Final = 397
"""How long a certificate is valid, in days: what browsers take at most."""
MAX_DAYS: Final = 3650
"""How long an authority is valid, and a certificate at most."""
_BACKDATED: Final = datetime.timedelta(hours=1)
"""A certificate is valid from so long ago, because the clocks of two machines differ."""
_MAX_COMMON_NAME: Final = 64
_USAGES: Final = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


def init(directory: str | os.PathLike[str], name: str = "splitbundle") -> Authority:
    """Make an authority in a directory that is new or empty.

    Args:
        directory: the directory.
        name: what certificates call the authority.

    Raises:
        BundleError: ``keys.directory`` if something is there; ``input.value``, ``output.*``.
    """
    name = key_names.client_name(name)
    root = Path(directory)
    if os.path.lexists(root) and not is_empty(root):
        got = "an authority" if os.path.lexists(root / CA) else "something else"
        raise bad_directory(root, "an empty directory, or nothing there", got, "Choose another directory")
    key = generate_private_key(SECP256R1())
    # The organization makes this another name than any that a certificate has.
    said = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "splitbundle keys")]
    subject = x509.Name([*said, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    end = _now() + datetime.timedelta(days=MAX_DAYS)
    certificate = _builder(key, subject, subject, end, is_authority=True).sign(key, hashes.SHA256())
    with atomic_directory(root, force=True, ours=is_empty) as staging:
        staging.chmod(0o700)
        for room in (ISSUED, *ROOMS.values()):
            (staging / room).mkdir()
        (staging / CA).write_bytes(certificate.public_bytes(Encoding.PEM))
        write_key(staging / CA_KEY, _private(key))
        (staging / revoked_certificates.FILE).write_bytes(revoked_certificates.make_revoked(()))
    return Authority(path=root, expires=certificate.not_valid_after_utc)


def server(directory: str | os.PathLike[str], host: str, *hosts: str, days: int = DAYS) -> Certificate:
    """Make a certificate for a server.

    Args:
        directory: the directory of the authority.
        host: the host name or the IP address of the server, which names its directory.
        *hosts: further names and addresses, by which clients may call it.
        days: how long the certificate is valid. It ends with the authority at the latest.

    Raises:
        BundleError: ``keys.directory``, ``keys.file``, ``input.value``; ``output.exists`` for a name that is taken.
    """
    names = tuple(dict.fromkeys(key_names.host_name(each) for each in (host, *hosts)))
    return _issue_new(Path(directory), "server", names[0], names, days)


def client(directory: str | os.PathLike[str], name: str, *, days: int = DAYS) -> Certificate:
    """Make a certificate for a client.

    Args:
        directory: the directory of the authority.
        name: the name by which servers know the client.
        days: how long the certificate is valid. It ends with the authority at the latest.

    Raises:
        BundleError: ``keys.directory``, ``keys.file``, ``input.value``; ``output.exists`` for a name that is taken.
    """
    return _issue_new(Path(directory), "client", key_names.client_name(name), (), days)


def rotate(directory: str | os.PathLike[str], name: str, *, days: int = DAYS) -> Certificate:
    """Give a client or a server a new key and a new certificate. The earlier ones stay valid.

    The machine's directory is replaced as a whole, so a key never lies beside another key's certificate.

    Args:
        directory: the directory of the authority.
        name: the client's name, or the host that names the server's directory.
        days: how long the new certificate is valid. It ends with the authority at the latest.

    Raises:
        BundleError: ``keys.directory``, ``keys.file``; ``input.value`` for a name that nobody has;
            ``output.exists`` if files of other names lie in the machine's directory.
    """
    root = Path(directory)
    with locked(root):
        kind, target = existing(root, name)
        old = _described(target / CERTIFICATE)
        return _issue(root, target, kind, old.name if kind == "server" else name, old.hosts, days)


def revoke(directory: str | os.PathLike[str], name: str) -> Revocation:
    """Revoke every certificate that a client ever had. Servers refuse them once they have their new lists.

    It writes all lists, even if the certificates were revoked before: an earlier call may have been interrupted.

    Args:
        directory: the directory of the authority.
        name: the name of a client.

    Raises:
        BundleError: ``keys.directory``, ``keys.file``; ``input.value`` for a name that no client has;
            ``json.*`` and ``field.*`` for a damaged list.
    """
    root = Path(directory)
    with locked(root):
        before = read_revoked(root)
        every = [each for each in _every_certificate(root, before) if (each.kind, each.name) == ("client", name)]
        if not every:
            kind, _ = existing(root, name)  # of a server
            hint = "Clients read no list. To end the trust in the key of a server, make a new authority"
            raise wrong_argument("name", "the name of a client", f"a {kind}", hint)
        revoked = tuple(dict.fromkeys((*before, *(each.fingerprint for each in every))))
        if len(revoked) > revoked_certificates.MAX_CERTIFICATES:
            expected = f"at most {revoked_certificates.MAX_CERTIFICATES} revoked certificates"
            raise bad_directory(root, expected, f"{len(revoked)}", "Make a new authority")
        document = revoked_certificates.make_revoked(revoked)
        lists = [root / revoked_certificates.FILE]
        lists += [place / revoked_certificates.FILE for place in directories(root, "server")]
        for place in lists:
            with atomic_file(place, force=True, ours=lambda _: True) as file:
                file.write(document)
    return Revocation(certificates=tuple(replace(each, revoked=True) for each in every), lists=tuple(lists))


def listing(directory: str | os.PathLike[str]) -> tuple[Certificate, ...]:
    """Return every certificate that the authority made, by name and then by its end.

    Raises:
        BundleError: ``keys.directory``, ``keys.file``, ``json.*``, ``field.*``.
    """
    root = Path(directory)
    check_authority(root)
    every = _every_certificate(root, read_revoked(root))
    return tuple(sorted(every, key=lambda each: (each.kind, each.name, each.expires)))


def has_ended(certificate: Certificate) -> bool:
    """Return whether a certificate has ended by the clock of this machine."""
    return certificate.expires <= _now()


def _issue_new(root: Path, kind: Kind, name: str, hosts: tuple[str, ...], days: int) -> Certificate:
    directory = key_names.directory_of(name) if kind == "server" else name
    with locked(root):
        for room in ROOMS.values():  # one name for a server and a client would leave open whom rotate means
            place = root / room / directory
            if os.path.lexists(place):
                hint = "splitbundle keys rotate gives it a new key and a new certificate"
                expected = "a name that no server and no client has"
                raise BundleError(
                    Problem(code="output.exists", file=str(place), expected=expected, got="a directory", hint=hint)
                )
        return _issue(root, root / ROOMS[kind] / directory, kind, name, hosts, days)


def _issue(root: Path, target: Path, kind: Kind, name: str, hosts: tuple[str, ...], days: int) -> Certificate:
    """Make a key and a certificate, and put them into the directory ``target``."""
    if not 1 <= days <= MAX_DAYS:
        raise wrong_argument("days", f"a number from 1 to {MAX_DAYS}", quoted(days))
    authority, signing_key = _signer(root)
    end = min(_now() + datetime.timedelta(days=days), authority.not_valid_after_utc)
    if end <= _now():
        raise bad_directory(root, "an authority that is valid", f"one that ended at {end}", "Make a new authority")
    key = generate_private_key(SECP256R1())
    short = len(name) <= _MAX_COMMON_NAME  # the name of a host may be longer
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if short else [])
    builder = _builder(key, subject, authority.subject, end, is_authority=False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([_USAGES[kind]]), False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    builder = builder.add_extension(issuer, False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(each) for each in hosts]), not short)
    made = builder.sign(signing_key, hashes.SHA256()).public_bytes(Encoding.PEM)
    record_of_it = root / ISSUED / f"{fingerprint_of(made)}.pem"
    with atomic_file(record_of_it, force=False, ours=lambda _: False) as file:  # before anybody can use it
        file.write(made)
    with atomic_directory(target, force=True, ours=is_identity) as staging:
        staging.chmod(0o700)
        (staging / CA).write_bytes(authority.public_bytes(Encoding.PEM))
        (staging / CERTIFICATE).write_bytes(made)
        write_key(staging / KEY, _private(key))
        if kind == "server":
            document = revoked_certificates.make_revoked(read_revoked(root))
            (staging / revoked_certificates.FILE).write_bytes(document)
    return _described(record_of_it, path=target)


def _builder(
    key: EllipticCurvePrivateKey, subject: x509.Name, issuer: x509.Name, end: datetime.datetime, *, is_authority: bool
) -> x509.CertificateBuilder:
    """Return what every certificate has. OpenSSL and BoringSSL check the constraints and the usage of keys."""
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), True)
        .add_extension(usage, True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    )


def _signer(root: Path) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
    authority = _loaded(root / CA)
    data = tls_files.read_private_key(root, CA_KEY)
    try:
        key = load_pem_private_key(data, None)
        if isinstance(key, EllipticCurvePrivateKey) and key.public_key() == authority.public_key():
            return authority, key
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise bad_file(root / CA_KEY, "a private key in PEM", "another file") from error
    raise bad_file(root / CA_KEY, f"the private key of {CA}, on the curve P-256", "another key")


def _loaded(place: Path) -> x509.Certificate:
    data = tls_files.read_certificates(place.parent, place.name)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise bad_file(place, "a certificate in PEM", "another file") from error


def _described(place: Path, revoked: Collection[str] = (), path: Path | None = None) -> Certificate:
    """Return what a certificate of this authority says."""
    loaded = _loaded(place)
    fingerprint = fingerprint_of(loaded.public_bytes(Encoding.DER))
    try:
        usages = loaded.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        kind: Kind = "server" if _USAGES["server"] in usages else "client"
        hosts: tuple[str, ...] = ()
        if kind == "server":
            names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            hosts = tuple(str(each.value) for each in names)
        name = hosts[0] if hosts else str(loaded.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    except (ValueError, IndexError, x509.ExtensionNotFound) as error:
        raise bad_file(place, "a certificate of this authority", "another one") from error
    return Certificate(
        name=name,
        kind=kind,
        hosts=hosts,
        fingerprint=fingerprint,
        expires=loaded.not_valid_after_utc,
        path=path,
        revoked=fingerprint in revoked,
    )


def _every_certificate(root: Path, revoked: Collection[str]) -> list[Certificate]:
    """Return every certificate that was made, and the directory that each is in now."""
    gone = frozenset(revoked)
    places = [place / CERTIFICATE for kind in ROOMS for place in directories(root, kind)]
    # The owner of a directory may have moved its files to the machine.
    here = [_described(each, gone, each.parent) for each in places if os.path.lexists(each)]
    records = [each for each in (root / ISSUED).glob("*.pem") if not each.name.startswith(".")]
    found = {each.fingerprint: each for each in (_described(place, gone) for place in records)}
    return list((found | {each.fingerprint: each for each in here}).values())


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ip_address(host)) if key_names.is_address(host) else x509.DNSName(host)


def _private(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
