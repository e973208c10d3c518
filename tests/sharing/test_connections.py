"""How a client connects: TLS, proxies, hosts without TLS, and limits that the environment sets."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError
from splitbundle.cli.main import main
from splitbundle.sharing.network import Patience, network_error, patience, persistently
from tests.support.http_server import LoopbackServer
from tests.support.paths import TESTS
from tests.support.static_server import StaticFiles, static_server

GOLDEN = TESTS / "golden" / "v1.0"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPLITBUNDLE_RETRIES", "0")
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "cache"


def certificate(path: Path) -> Path:
    """Write a certificate for 127.0.0.1, and its key, into one file."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


class WithTls(StaticFiles):
    """A static server with TLS."""

    pem: Path

    def __enter__(self) -> WithTls:
        super().__enter__()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.pem)
        listener, _ = self._listeners[0]
        listener.socket = context.wrap_socket(listener.socket, server_side=True)
        self.url = self.url.replace("http://", "https://")
        return self


@pytest.mark.rule("SB-S-006")
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_certificates(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WithTls(GOLDEN)
    server.pem = certificate(tmp_path / "key.pem")
    with server:
        with pytest.raises(BundleError) as caught:
            splitbundle.pull(f"{server.url}/gpt2.splitbundle")
        assert caught.value.codes == ("network.auth",)
        assert "certificate" in caught.value.problems[0].expected
        monkeypatch.setenv(variable, str(server.pem))
        assert splitbundle.pull(f"{server.url}/gpt2.splitbundle").verify()


def test_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the test takes whole URLs, and so it is a proxy for its own files."""
    monkeypatch.setenv("SPLITBUNDLE_PLAIN_HTTP", "nas.example")
    with static_server(GOLDEN) as server:
        monkeypatch.setenv("http_proxy", server.url)
        assert splitbundle.pull("http://nas.example/gpt2.splitbundle").verify()
        server.reset_counters()
        monkeypatch.setenv("no_proxy", "nas.example")
        with pytest.raises(BundleError) as caught:
            splitbundle.pull("http://nas.example/llama.splitbundle", timeout=2)
        assert caught.value.codes == ("network",)
        assert not server.requests


@pytest.mark.rule("SB-S-006")
def test_without_tls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "http://nas.example/a", "--json"]) == 2
    problem = json.loads(capsys.readouterr().out)["problems"][0]
    assert problem["code"] == "usage.reference"
    assert "--plain-http, or SPLITBUNDLE_PLAIN_HTTP=nas.example" in problem["hint"]
    with static_server(GOLDEN) as server:
        monkeypatch.setenv("http_proxy", server.url)
        monkeypatch.setenv("SPLITBUNDLE_PLAIN_HTTP", "")
        assert main(["pull", "http://nas.example/gpt2.splitbundle", "--plain-http", "--json"]) == 0


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """Without its library, a reference ends with 4 and the line that installs it."""
    program = """
import sys
sys.modules[sys.argv[1]] = None
from splitbundle.cli.main import main
sys.exit(main(["pull", sys.argv[2], "--json"]))
"""
    for library, reference in (("huggingface_hub", "hf://a/b"), ("fsspec", "s3://a/b")):
        command = [sys.executable, "-c", program, library, reference]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 4, done.stderr
        assert json.loads(done.stdout)["problems"][0]["hint"] == 'Install it: pip install "splitbundle[share]"'


def test_pull_loads_no_backend(tmp_path: Path) -> None:
    program = """
import sys
from splitbundle.cli.main import main
status = main(["pull", sys.argv[1], "--quiet"])
loaded = {"torch", "onnxruntime", "numpy", "huggingface_hub", "fsspec", "transformers"} & set(sys.modules)
sys.exit(f"loaded {loaded}" if loaded else status)
"""
    with static_server(GOLDEN) as server:
        command = [sys.executable, "-c", program, f"{server.url}/gpt2.splitbundle"]
        subprocess.run(command, check=True, capture_output=True)


@pytest.mark.rule("SB-S-007")
def test_how_often_something_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(wait: float | None = None, transient: bool = True) -> None:
        calls.append(1)
        raise network_error("network", "x", "y", "z", transient=transient, wait=wait)

    how = Patience(retries=3, backoff=0.001)
    for work, count in ((fail, 4), (lambda: fail(0.0), 4), (lambda: fail(1e9), 1), (lambda: fail(None, False), 1)):
        calls.clear()
        with pytest.raises(BundleError):
            persistently(work, how)
        assert len(calls) == count
    monkeypatch.setenv("SPLITBUNDLE_RETRIES", "7")
    monkeypatch.setenv("SPLITBUNDLE_TIMEOUT", "1.5")
    assert (patience().retries, patience().timeout, patience(2.0, 1).timeout) == (7, 1.5, 2.0)
    for value in ("x", "-1", "nan", "1e9"):
        monkeypatch.setenv("SPLITBUNDLE_TIMEOUT", value)
        with pytest.raises(BundleError) as caught:
            patience()
        assert caught.value.problems[0].argument == "SPLITBUNDLE_TIMEOUT"


def test_free_space_is_checked_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.sharing.store import Store

    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    server: LoopbackServer
    with static_server(GOLDEN) as server:
        with pytest.raises(BundleError) as caught:
            splitbundle.pull(f"{server.url}/gpt2.splitbundle")
        assert caught.value.codes == ("output.space",)
        assert not server.seen("GET", "*.safetensors")


@pytest.mark.rule("SB-S-005")
def test_this_machine_is_never_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPLITBUNDLE_TOKEN", "s3cret")
    with static_server(GOLDEN, token="s3cret") as server, static_server(GOLDEN) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert splitbundle.pull(f"{server.url}/gpt2.splitbundle").verify()
        assert not proxy.requests


def test_a_proxy_is_named_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:s3cret@127.0.0.1:1")
    with pytest.raises(BundleError) as caught:
        splitbundle.pull("https://example.invalid/a")
    assert "127.0.0.1:1" in str(caught.value.problems[0].hint)
    assert "s3cret" not in str(caught.value)


@pytest.mark.rule("SB-S-005")
@pytest.mark.parametrize("scheme", ["http", "oci"])
def test_a_token_that_no_header_may_have_is_not_shown(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with static_server(GOLDEN) as server:
        for token in ("bad\ntok", "bad\x7ftok", "bäd"):
            monkeypatch.setenv("SPLITBUNDLE_TOKEN", token)
            with pytest.raises(BundleError) as caught:
                splitbundle.pull(f"{scheme}://{server.host}/gpt2.splitbundle")
            assert "SPLITBUNDLE_TOKEN" in str(caught.value)
            assert "tok" not in str(caught.value).replace("token", "").replace("TOKEN", "")
        monkeypatch.setenv("SPLITBUNDLE_TOKEN", "good\n")
        if scheme == "http":
            assert splitbundle.pull(f"{server.url}/gpt2.splitbundle").verify()


@pytest.mark.parametrize("value", ["1", "true", "maybe"])
@pytest.mark.parametrize(
    "arguments", [("push", str(GOLDEN / "gpt2.splitbundle"), "R"), ("tag", "R", "x"), ("untag", "R:x"), ("list", "R")]
)
def test_offline_is_offline(
    arguments: tuple[str, ...], value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITBUNDLE_OFFLINE", value)
    with static_server(GOLDEN) as server:
        given = [
            argument.replace("R", f"oci://{server.host}/a") if argument[0] == "R" else argument
            for argument in arguments
        ]
        assert main([*given, "--json"]) == 5
        assert not server.requests
    assert json.loads(capsys.readouterr().out)["problems"][0]["got"] == "offline"


def test_a_place_with_a_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splitbundle.open(GOLDEN / "gpt2.splitbundle").extract(tmp_path / "part.splitbundle", "trunk")
    with static_server(tmp_path) as server:
        with pytest.raises(BundleError) as caught:
            splitbundle.pull(f"{server.url}/part.splitbundle")
        assert caught.value.codes == ("network.missing",)
        assert "only a part" in str(caught.value.problems[0].hint)
        assert splitbundle.pull(f"{server.url}/part.splitbundle", shards=["trunk"]).whole_shards() == ("trunk",)


def test_an_output_is_judged_before_anything_is_pulled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    with static_server(GOLDEN) as server:
        for name in ("other", "file"):
            for force in (False, True):
                with pytest.raises(BundleError) as caught:
                    splitbundle.pull(f"{server.url}/gpt2.splitbundle", tmp_path / name, force=force)
                assert caught.value.codes == ("output.exists",)
        assert not server.requests
        assert splitbundle.pull(f"{server.url}/gpt2.splitbundle", tmp_path / "empty").verify(exact=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_proxy_of_another_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5h://127.0.0.1:1")
    with pytest.raises(BundleError) as caught:
        splitbundle.pull("https://example.invalid/a")
    assert caught.value.problems[0].got == "one by 'socks5h'"


def test_each_wait_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pull", "https://127.0.0.1:1/a", "--retries", "1"]
    assert main(command) == 5
    assert "Trying again in 0.5 s" in capsys.readouterr().err
    assert main([*command, "--quiet"]) == 5
    assert "Trying again" not in capsys.readouterr().err


def test_options_that_would_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["pull", "https://127.0.0.1:1/a", "--text"])
    assert "they need --shard" in capsys.readouterr().err


def test_the_users_own_files_stay(tmp_path: Path) -> None:
    """A pull into a part of the same bundle adds files. It replaces nothing but wrong ones."""
    target = tmp_path / "mine.splitbundle"
    with static_server(GOLDEN) as server:
        reference = f"{server.url}/gpt2.splitbundle"
        splitbundle.pull(reference, target, shards=["trunk"])
        (target / "logs").mkdir()
        (target / "logs" / "notes").write_text("mine")
        kept = (target / "layer-001.safetensors").stat()
        (target / "layer-002.safetensors").write_bytes(b"")
        splitbundle.pull(reference, target)
    assert (target / "logs" / "notes").read_text() == "mine"
    assert (target / "layer-001.safetensors").stat().st_ino == kept.st_ino
    assert splitbundle.open(target).verify().unlisted == ("logs/notes",)
    assert not list(tmp_path.glob(".*"))


def test_the_current_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with static_server(GOLDEN) as server:
        for force in (False, True):
            with pytest.raises(BundleError, match=r"\[output\.exists\].*Name a new directory"):
                splitbundle.pull(f"{server.url}/gpt2.splitbundle", ".", force=force)
        assert not server.seen("GET", "*.safetensors")
        splitbundle.pull(f"{server.url}/gpt2.splitbundle", "part", shards=["trunk"])
        monkeypatch.chdir(tmp_path / "part")
        assert splitbundle.pull(f"{server.url}/gpt2.splitbundle", ".").verify(exact=True)
    assert (Path.cwd() / "manifest.json").exists()


@pytest.mark.parametrize("text", ["https://h/a?token=p", "sftp://u:p@h/x", "oci://me:p@h/a:v1"])
def test_a_secret_in_a_reference_is_masked_and_the_rest_is_readable(text: str) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle.pull(text)
    said = str(caught.value)
    assert "***" in said
    assert not re.search(r"[:=?]p[@' ]|\\u2026|token=p", said)
    assert "reference" in said or "expected" in said


def test_a_directory_that_another_thread_made() -> None:
    from splitbundle.sharing.filesystems import _make_directory

    class System:
        def __init__(self, there: bool) -> None:
            self.there = there

        def makedirs(self, path: str, *, exist_ok: bool) -> None:
            raise RuntimeError("550 File exists.")

        def isdir(self, path: str) -> bool:
            return self.there

    _make_directory(System(there=True), "x")
    with pytest.raises(RuntimeError):
        _make_directory(System(there=False), "x")
