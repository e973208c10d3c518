"""A certificate is refused where it can't be used: that of a client by a server, and the reverse."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.cli.main import main
from splitbundle.remote.tls_purpose import check_purpose
from splitbundle.serving import keys
from tests.support.paths import TESTS

BUNDLE = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys") / "keys"
    keys.init(root)
    keys.server(root, "127.0.0.1")
    keys.client(root, "alice")
    return root


def test_what_each_side_may_show(group: Path) -> None:
    check_purpose(group / "servers" / "127.0.0.1", "server")
    check_purpose(group / "clients" / "alice", "client")


def test_a_server_with_the_certificate_of_a_client(group: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = group / "clients" / "alice"
    message = r"\[keys\.file\] .*cert\.pem: expected the certificate of a server, got one that isn't for servers"
    with pytest.raises(BundleError, match=message) as raised:
        StageServer(splitbundle.open(BUNDLE), "trunk", tls=place)
    assert "splitbundle keys server made" in str(raised.value)
    assert main(["serve-stage", str(BUNDLE), "trunk", "--listen", "127.0.0.1:0", "--tls", str(place)]) == 1
    assert "one that isn't for servers" in capsys.readouterr().err


def test_a_client_with_the_certificate_of_a_server(group: Path) -> None:
    message = r"\[keys\.file\] .*expected the certificate of a client, got one that isn't for clients"
    with pytest.raises(BundleError, match=message):
        splitbundle.open(BUNDLE).stage(
            "trunk", remote="grpcs://127.0.0.1:1", tls=str(group / "servers" / "127.0.0.1"), timeout=1
        )


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
@pytest.mark.parametrize(
    ("extensions", "refused"),
    [
        (["subjectAltName=IP:127.0.0.1"], []),  # no usage: it is for everything
        (["subjectAltName=IP:127.0.0.1", "extendedKeyUsage=serverAuth,clientAuth"], []),
        (["subjectAltName=IP:127.0.0.1", "extendedKeyUsage=codeSigning"], ["server", "client"]),
        ([], ["server"]),  # no name
    ],
)
def test_certificates_from_elsewhere(tmp_path: Path, extensions: list[str], refused: list[str]) -> None:
    made = [word for extension in extensions for word in ("-addext", extension)]
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-days",
                "9",
            ),
            *("-subj", "/CN=other", *made, "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    for side in ("server", "client"):
        if side in refused:
            with pytest.raises(BundleError, match=rf"expected the certificate of a {side}, got one "):
                check_purpose(tmp_path, side)  # type: ignore[arg-type]
        else:
            check_purpose(tmp_path, side)  # type: ignore[arg-type]
