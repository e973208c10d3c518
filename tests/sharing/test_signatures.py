"""Signatures of bundles: who made one, which files it covers, and which copies take it along."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

import splitbundle
import splitbundle_converter
import splitbundle_schemas
from splitbundle import Bundle, BundleError, VerificationError
from splitbundle.format import signature_document
from splitbundle.storage import signature_files
from tests.support.checkpoints import digests
from tests.support.command_line import run
from tests.support.paths import TESTS
from tests.support.signing_keys import GOOD, Keys, payload_of

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
DATA = TESTS / "sharing" / "data"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return splitbundle.open(shutil.copytree(GOLDEN, tmp_path / "b.splitbundle"))


# Signing and checking.


@pytest.mark.rule("SB-D-014", "SB-D-017", "SB-D-018", "SB-D-019", "SB-D-023")
@pytest.mark.parametrize("kind", GOOD)
def test_a_signature_proves_a_bundle(kind: str, bundle: Bundle, keys: Keys) -> None:
    private, public = keys.make(kind)
    before = digests(bundle.path)
    made = bundle.sign(private)
    place = bundle.path / made.path
    assert made.path == f"signatures/{made.key.removeprefix('sha256:')[:16]}.sigstore.json"
    assert made.files == len(bundle.manifest.files) + 2
    found = bundle.verify_signature(public)
    assert (found.path, found.key, found.public_key, found.files) == (made.path, made.key, str(public), made.files)
    document, statement = json.loads(place.read_text()), payload_of(place)
    for name, value in (("signature", document), ("statement", statement)):
        jsonschema.Draft202012Validator(splitbundle_schemas.load(name)).validate(value)
    resources = {each["name"]: each["digest"] for each in statement["predicate"]["resources"]}
    assert resources == before
    assert list(resources) == sorted(resources, key=lambda path: Path(path).parts)
    # The bundle is the same one, and nothing is left over.
    assert splitbundle.open(bundle.path).id == bundle.id
    assert {path for path in digests(bundle.path) if path not in before} == {made.path}
    assert bundle.verify(exact=True, whole=True).unlisted == ()


@pytest.mark.rule("SB-D-017")
@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_openssl_checks_the_signature(kind: str, bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    """Another program reads the signature as the specification says."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl isn't installed")
    private, public = keys.make(kind)
    document = json.loads((bundle.path / bundle.sign(private).path).read_text())["dsseEnvelope"]
    payload = base64.b64decode(document["payload"])
    message = b"DSSEv1 28 application/vnd.in-toto+json " + str(len(payload)).encode() + b" " + payload
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "sig").write_bytes(base64.b64decode(document["signatures"][0]["sig"]))
    hashed = {"p256": "-sha256", "p384": "-sha384", "p521": "-sha512"}[kind]
    command = ["openssl", "dgst", hashed, "-verify", public, "-signature", "sig", "message"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "Verified OK\n"


@pytest.mark.rule("SB-D-019")
def test_a_signature_of_openssf_model_signing_holds() -> None:
    """The file was written by model-signing 1.1.1 for a draft's bundle, with a key that nobody has any more."""
    bundle = splitbundle.open(TESTS / "golden" / "drafts" / "signed.splitbundle")
    given = DATA / "model_signing.sigstore.json", DATA / "model_signing.pub.pem"
    found = bundle.verify_signature(given[1], signature=given[0])
    assert (found.files, found.path) == (14, str(given[0]))
    own = {each["name"]: each["digest"] for each in payload_of(given[0])["predicate"]["resources"]}
    statement = json.loads(signature_document.make_statement("n.splitbundle", own))
    theirs = payload_of(given[0])
    assert statement["subject"] == theirs["subject"]
    assert statement["predicate"]["resources"] == theirs["predicate"]["resources"]


@pytest.mark.rule("SB-D-019")
def test_one_of_several_keys_and_signatures_suffices(bundle: Bundle, keys: Keys) -> None:
    (one, one_public), (other, other_public) = keys.make("ed25519"), keys.make("p256")
    _, third = keys.make("p384")
    bundle.sign(one)
    bundle.sign(other, name="release-1.0")
    (bundle.path / "signatures" / "0.sigstore.json").write_text("junk")
    assert bundle.verify_signature([third, other_public]).path == "signatures/release-1.0.sigstore.json"
    assert bundle.verify_signature([third, one_public]).public_key == str(one_public)
    with pytest.raises(VerificationError) as caught:
        bundle.verify_signature([third])
    assert sorted(caught.value.codes) == ["json.syntax", "signature.invalid", "signature.invalid"]
    with pytest.raises(BundleError, match=r"\[input\.value\] public_keys"):
        bundle.verify_signature([])


@pytest.mark.rule("SB-D-019", "SB-D-016")
def test_one_shard_alone_is_proven(
    bundle: Bundle, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys.make("ed25519")
    made = bundle.sign(private)
    part = bundle.extract(tmp_path / "part", "trunk")
    assert part.verify_signature(public).path == made.path
    assert made.path in bundle.paths("trunk")
    status, out, err = run(capsys, "verify", part.path, "--shard", "trunk", "--public-key", public, "--json")
    told = json.loads(out)
    assert (status, told["ok"], err) == (0, True, "The bundle is partial. These shards have all their files: trunk.\n")
    assert told["signature"] == {"path": made.path, "key": made.key, "public_key": str(public), "files": 15}
    # A part can be signed as well: the signature is one of the whole bundle.
    (part.path / made.path).unlink()
    part.sign(private)
    assert (part.path / made.path).read_bytes() == (bundle.path / made.path).read_bytes()
    (part.path / "layer-001.safetensors").write_bytes((part.path / "layer-001.safetensors").read_bytes()[:-1] + b"x")
    status, _, err = run(capsys, "verify", part.path, "--shard", "trunk", "--public-key", public)
    assert (status, "[file.digest] layer-001.safetensors" in err) == (3, True)


# What takes signatures along.


@pytest.mark.rule("SB-D-016")
def test_copies_of_a_bundle_take_signatures_along(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    bundle.sign(keys.make("p256")[0], name="both")
    one, other = bundle.extract(tmp_path / "one", "trunk"), bundle.extract(tmp_path / "other", "bottom", "top")
    one.sign(keys.make("p256")[0], name="both", force=True)
    one.sign(keys.make("ed25519")[0], name="one")
    other.sign(keys.make("p384")[0], name="other")
    (other.path / "signatures" / "notes.txt").write_text("no signature")
    merged = splitbundle.merge([one, other], tmp_path / "merged")
    expected = {f"signatures/{name}.sigstore.json" for name in ("both", "one", "other")}
    assert set(digests(merged.path)) - set(merged.manifest.files) == expected | {"manifest.json", "SHA256SUMS"}
    first = "signatures/both.sigstore.json"
    assert (merged.path / first).read_bytes() == (one.path / first).read_bytes()
    for kind in ("p256", "ed25519", "p384"):
        merged.verify_signature(keys.make(kind)[1])
    back = splitbundle.unpack(merged.pack(tmp_path / "x.tar").path, tmp_path / "back")
    assert digests(back.path) == digests(merged.path)


@pytest.mark.rule("SB-D-016")
def test_other_bundles_have_no_signatures(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    private, public = keys.make("ed25519")
    bundle.sign(private)
    makers: tuple[Callable[[Path], Bundle], ...] = (
        lambda place: bundle.cast(place, "float16", vectors=False),
        lambda place: bundle.save_as(place, bundle.stage("trunk"), vectors=False),
        lambda place: splitbundle_converter.resplit(bundle, place, split=[1], onnx=False),
    )
    for number, make in enumerate(makers):
        made = make(tmp_path / f"made-{number}")
        assert not (made.path / "signatures").exists()
        with pytest.raises(VerificationError, match=r"\[signature\.missing\]"):
            made.verify_signature(public)
        if made.id != bundle.id:
            with pytest.raises(VerificationError) as caught:
                made.verify_signature(public, signature=bundle.path / bundle.verify_signature(public).path)
            assert set(caught.value.codes) == {"signature.files"}
            assert "manifest.json" in caught.value.problems[0].expected


# What the directory may hold.


@pytest.mark.rule("SB-D-014")
def test_what_is_no_signature_is_not_listed(bundle: Bundle, tmp_path: Path) -> None:
    signatures = bundle.path / "signatures"
    signatures.mkdir()
    assert bundle.verify(exact=True).unlisted == ()  # the empty directory
    good = signatures / "a.sigstore.json"
    good.write_bytes(b"")
    (signatures / "notes.txt").write_text("")
    (signatures / "Upper.sigstore.json").write_text("")
    (signatures / ".sigstore.json").write_text("")
    (signatures / "con.sigstore.json").write_text("")
    (signatures / "link.sigstore.json").symlink_to("a.sigstore.json")
    (signatures / "folder.sigstore.json").mkdir()
    (signatures / "more").mkdir()
    (signatures / "more" / "b.sigstore.json").write_text("")
    os.mkfifo(signatures / "pipe.sigstore.json")
    (signatures / "large.sigstore.json").touch()
    os.truncate(signatures / "large.sigstore.json", 2**24 + 1)
    names = (
        ".sigstore.json",
        "Upper.sigstore.json",
        "con.sigstore.json",
        "folder.sigstore.json/",
        "large.sigstore.json",
    )
    names += ("link.sigstore.json", "more/b.sigstore.json", "notes.txt", "pipe.sigstore.json")
    assert bundle.verify().unlisted == tuple(f"signatures/{name}" for name in names)
    with pytest.raises(BundleError) as caught:
        bundle.verify(exact=True)
    assert set(caught.value.codes) == {"file.unlisted"}
    part = bundle.extract(tmp_path / "part", "trunk")
    assert [path.name for path in (part.path / "signatures").iterdir()] == ["a.sigstore.json"]


@pytest.mark.rule("SB-D-014")
def test_a_directory_that_is_a_link_has_no_signatures(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.sigstore.json").write_text("{}")
    (bundle.path / "signatures").symlink_to(tmp_path / "elsewhere")
    assert bundle.verify().unlisted == ("signatures",)
    assert not (bundle.extract(tmp_path / "part", "trunk").path / "signatures").exists()
    with pytest.raises(VerificationError, match=r"\[signature\.missing\]"):
        bundle.verify_signature(keys.make("p256")[1])


@pytest.mark.rule("SB-D-014")
def test_there_are_at_most_64(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    (bundle.path / "signatures").mkdir()
    for i in range(65):
        (bundle.path / "signatures" / f"{i:02}.sigstore.json").write_text("{}")
    assert bundle.verify().unlisted == ("signatures/64.sigstore.json",)
    with pytest.raises(BundleError, match=r"\[output\.exists\].*at most 64 signatures"):
        bundle.sign(keys.make("ed25519")[0])
    bundle.sign(keys.make("ed25519")[0], output=tmp_path / "mine.json")
    part = bundle.extract(tmp_path / "part", "trunk")
    assert len(list((part.path / "signatures").iterdir())) == 64


OPENED = """
import sys, splitbundle
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
bundle = splitbundle.open(sys.argv[1])
bundle.verify(exact=True)
bundle.stage("trunk", backend="torch")
print(*[path for path in opened if "sigstore" in path])
"""


@pytest.mark.rule("SB-D-015")
def test_signatures_are_not_opened_unless_asked(bundle: Bundle, keys: Keys) -> None:
    bundle.sign(keys.make("ed25519")[0])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OPENED, str(bundle.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "\n"


# Signing.


def test_a_damaged_bundle_is_not_signed(bundle: Bundle, keys: Keys) -> None:
    private, _ = keys.make("ed25519")
    (bundle.path / "SHA256SUMS").write_text("")
    with pytest.raises(BundleError, match=r"\[sums\.mismatch\]"):
        bundle.sign(private)
    place = bundle.path / "layer-002.safetensors"
    place.write_bytes(place.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BundleError, match=r"\[file\.digest\] layer-002\.safetensors"):
        bundle.sign(private)
    assert not (bundle.path / "signatures").exists()


def test_an_existing_signature_stays_unless_forced(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    private, public = keys.make("p256")
    place = bundle.path / bundle.sign(private).path
    first = place.read_bytes()
    with pytest.raises(BundleError, match=r"\[output\.exists\]"):
        bundle.sign(private)
    assert place.read_bytes() == first
    bundle.sign(private, force=True)
    assert place.read_bytes() != first  # ECDSA draws a number for each signature
    bundle.verify_signature(public)
    (tmp_path / "notes.json").write_text('{"my": "notes"}')
    with pytest.raises(BundleError, match=r"\[output\.exists\].*force=True won't replace it"):
        bundle.sign(private, output=tmp_path / "notes.json", force=True)
    for name in ("", "../x", "a/b", "Upper", "con", "x" * 90, "-x"):
        with pytest.raises(BundleError, match=r"\[input\.value\] name"):
            bundle.sign(private, name=name)


def test_a_signature_beside_the_bundle(
    bundle: Bundle, keys: Keys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys.make("ed25519")
    place = tmp_path / "new" / "b.sigstore.json"
    assert run(capsys, "sign", bundle.path, "--key", private, "-o", place)[0] == 0
    assert not (bundle.path / "signatures").exists()
    (tmp_path / "link").symlink_to(place)
    for given in (place, tmp_path / "link"):
        status, out, _ = run(capsys, "verify", bundle.path, "--public-key", public, "--signature", given)
        assert (status, f"  signed by {public}, sha256:" in out) == (0, True)
    for given in (tmp_path / "nothing", tmp_path):
        with pytest.raises(BundleError) as caught:
            bundle.verify_signature(public, signature=given)
        assert caught.value.codes in (("signature.missing",), ("file.kind",))


@pytest.mark.parametrize("kind", ["rsa", "ed448", "secp256k1"])
def test_other_kinds_of_keys_are_refused(kind: str, bundle: Bundle, keys: Keys) -> None:
    private, public = keys.make(kind)
    for call in (lambda: bundle.sign(private), lambda: bundle.verify_signature(public)):
        with pytest.raises(BundleError, match=r"\[signature\.key\].*expected a key for Ed25519, or for ECDSA on P-256"):
            call()


def test_files_that_are_no_keys(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    private, public = keys.make("ed25519")
    (tmp_path / "text").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(2**17))
    os.mkfifo(tmp_path / "pipe")
    cases = {"text": "signature.key", "empty": "signature.key", "large": "file.size", "pipe": "file.kind"}
    for name, code in {**cases, "nothing": "file.missing"}.items():
        for call in (lambda: bundle.sign(tmp_path / name), lambda: bundle.verify_signature(tmp_path / name)):  # noqa: B023
            with pytest.raises(BundleError) as caught:
                call()
            assert caught.value.codes == (code,)
    with pytest.raises(BundleError, match=r"\[signature\.key\].*expected a public key in PEM, got a private key"):
        bundle.verify_signature(private)
    with pytest.raises(BundleError, match=r"\[signature\.key\].*expected a private key in PEM"):
        bundle.sign(public)


def test_encrypted_keys(
    bundle: Bundle, keys: Keys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys.make("ed25519", "locked", b"corr\xc3\xa9ct")
    monkeypatch.delenv("SPLITBUNDLE_KEY_PASSWORD", raising=False)
    monkeypatch.setattr("sys.stdin", None)
    status, _, err = run(capsys, "sign", bundle.path, "--key", private)
    assert (status, "Set SPLITBUNDLE_KEY_PASSWORD" in err) == (1, True)
    monkeypatch.setenv("SPLITBUNDLE_KEY_PASSWORD", "wrong")
    status, out, err = run(capsys, "sign", bundle.path, "--key", private, "--json")
    assert status == 1
    assert "another passphrase" in json.loads(out)["problems"][0]["got"]
    assert "wrong" not in out + err
    monkeypatch.setenv("SPLITBUNDLE_KEY_PASSWORD", "corréct")
    assert run(capsys, "sign", bundle.path, "--key", private)[0] == 0
    bundle.verify_signature(public)
    # On a terminal the command asks.
    monkeypatch.delenv("SPLITBUNDLE_KEY_PASSWORD")
    terminal = type("Terminal", (), {"isatty": lambda self: True})()
    monkeypatch.setattr("sys.stdin", terminal)
    asked: list[str] = []
    monkeypatch.setattr("getpass.getpass", lambda prompt, stream: asked.append(prompt) or "corréct")
    assert run(capsys, "sign", bundle.path, "--key", private, "--force")[0] == 0
    assert asked == [f"Passphrase of {private}: "]
    with pytest.raises(BundleError, match=r"\[signature\.key\]"):
        bundle.sign(private, name="other", password="wrong")
    bundle.sign(private, name="other", password="corréct")
    bundle.sign(keys.make("p256")[0], password="not needed")


# The commands.


def test_what_the_commands_say(bundle: Bundle, keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = keys.make("p521")
    _, other = keys.make("p384")
    status, out, _ = run(capsys, "sign", bundle.path, "--key", private, "--json")
    told = json.loads(out)
    assert (status, told["bundle_id"], told["files"]) == (0, bundle.id, 15)
    assert Path(told["path"]).is_file()
    status, out, err = run(capsys, "verify", bundle.path)
    assert (status, json.loads(run(capsys, "verify", bundle.path, "--json")[1])["signature"]) == (0, None)
    assert "The bundle has a signature, not checked: --public-key checks who signed it." in err
    status, out, err = run(capsys, "verify", "--exact", bundle.path, "--public-key", other, "--public-key", public)
    assert (status, err) == (0, "")
    assert f"  signed by {public}, {told['key']}, in signatures/" in out
    status, out, err = run(capsys, "verify", bundle.path, "--public-key", other, "--json")
    problem = json.loads(out)["problems"][0]
    assert (status, problem["code"], problem["got"]) == (3, "signature.invalid", "one by another key")
    assert problem["file"].startswith("signatures/")
    shutil.rmtree(bundle.path / "signatures")
    assert run(capsys, "verify", bundle.path, "--public-key", public)[0] == 3
    assert run(capsys, "verify", bundle.path, "--public-key", private)[0] == 1  # nothing was checked
    status, _, err = run(capsys, "verify", bundle.path, "--public-key", "none.pem")
    assert (status, "[file.missing] none.pem: expected a key in PEM" in err) == (1, True)
    for wrong in (
        ["verify", bundle.path, "--signature", "x"],
        ["sign", bundle.path],
        ["sign", bundle.path, "--key", private, "-o", "x", "--name", "y"],
        ["sign", bundle.path, "--key", private, "-o", ""],
        ["sign", bundle.path, "--key", private, "--name", "A"],
    ):
        assert run(capsys, *wrong)[0] == 2, wrong


WITHOUT = """
import sys
sys.modules["cryptography"] = None
import splitbundle
from splitbundle.cli.main import main
bundle, private, public, archive = sys.argv[1:]
try:
    splitbundle.open(bundle).sign(private)
except splitbundle.MissingExtra as error:
    print(error.codes[0])
print(main(["sign", bundle, "--key", private]), main(["verify", bundle, "--public-key", public]))
print(main(["pack", bundle, "-o", archive, "--quiet"]))
"""


def test_without_the_library(bundle: Bundle, keys: Keys, tmp_path: Path) -> None:
    """Signatures need it, and archives don't."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-c",
        WITHOUT,
        str(bundle.path),
        *map(str, keys.make("ed25519")),
        str(tmp_path / "x.tar"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("backend.missing", "4 4", "0")
    assert done.stderr.count('pip install "splitbundle[share]"') == 2


def test_the_limits_are_the_specifications() -> None:
    text = (TESTS.parent / "spec" / "v1" / "bundle.md").read_text("utf-8")
    said = f"at most {signature_files.MAX_BYTES:,} bytes. Of more than {signature_files.MAX_NUMBER},"
    assert said in " ".join(text.split())
