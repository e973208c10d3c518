"""Archives from strangers: nothing is written, and a refusal takes little time and little memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError
from splitbundle.sharing import archive as archives
from tests.support.checkpoints import digests
from tests.support.paths import TESTS
from tests.support.yardsticks import at_most, parsing

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
TOP = "golden-gpt2.splitbundle"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The archive of a golden bundle."""
    place = tmp_path_factory.mktemp("packed") / "x.tar"
    splitbundle.open(GOLDEN).pack(place)
    return place.read_bytes()


Blocks = list[tuple[bytes, bytes]]
"""The members of an archive: a header, and the data with its padding."""


def blocks(data: bytes) -> Blocks:
    """Return the members of an archive that ``Bundle.pack`` made."""
    found: Blocks = []
    at = 0
    while data[at : at + 512] != bytes(512):
        size = int(data[at + 124 : at + 135], 8)
        end = at + 512 + -(-size // 512) * 512
        found.append((data[at : at + 512], data[at + 512 : end]))
        at = end
    return found


def joined(members: Blocks) -> bytes:
    return b"".join(header + data for header, data in members) + bytes(10240)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[bytes, bytes]:
    """Return a member with any fields of ``tarfile.TarInfo``."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT), data + bytes(-len(data) % 512)


def resealed(header: bytes, at: int, new: bytes) -> bytes:
    """Return a header with other bytes and the right checksum."""
    changed = bytearray(header)
    changed[at : at + len(new)] = new
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def added(*more: tuple[bytes, bytes]) -> Callable[[bytes], bytes]:
    return lambda data: joined([*blocks(data), *more])


def edited(number: int, at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Change a header."""

    def edit(data: bytes) -> bytes:
        found = blocks(data)
        found[number] = (resealed(found[number][0], at, new), found[number][1])
        return joined(found)

    return edit


def path_record(path: str) -> bytes:
    """Return the record of a POSIX extended header that names a path. Its length counts itself."""
    rest = f" path={path}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 5) if n == len(rest) + len(str(n)))
    return b"%d%s" % (length, rest)


def pax(name: str, records: bytes) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    return member("PaxHeader", records, type=tarfile.XHDTYPE), member(name)


def _one_bit(data: bytes) -> bytes:
    found = blocks(data)
    header, content = found[8]
    found[8] = (header, bytes([content[0] ^ 1]) + content[1:])
    return joined(found)


def _other_sums(data: bytes) -> bytes:
    found = blocks(data)
    header, content = found[1]
    found[1] = (header, b"0" + content[1:])
    return joined(found)


def _link_then_write(data: bytes) -> bytes:
    """The name of a directory is a link that leads out, and a file below it follows."""
    found = blocks(data)
    link = member(f"{TOP}/tokenizer", type=tarfile.SYMTYPE, linkname="/tmp")
    return joined([*found[:2], link, *found[2:]])


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "dotdot": (added(member(f"{TOP}/../evil")), "archive.name"),
    "dotdot first": (added(member("../evil")), "archive.name"),
    "dot inside": (added(member(f"{TOP}/./README.md")), "archive.name"),
    "empty part": (added(member(f"{TOP}//README.md")), "archive.name"),
    "absolute": (added(member("/etc/passwd")), "archive.name"),
    "outside": (added(member("other/README.md")), "archive.name"),
    "no name": (edited(3, 0, bytes(100)), "archive.name"),
    "a longer top": (added(member(f"{TOP}x/README.md")), "archive.name"),
    "a link": (_link_then_write, "archive.member"),
    "a hard link": (added(member(f"{TOP}/x", type=tarfile.LNKTYPE, linkname="/etc/passwd")), "archive.member"),
    "a device": (added(member(f"{TOP}/x", type=tarfile.CHRTYPE)), "archive.member"),
    "a block device": (added(member(f"{TOP}/x", type=tarfile.BLKTYPE)), "archive.member"),
    "a pipe": (added(member(f"{TOP}/x", type=tarfile.FIFOTYPE)), "archive.member"),
    "an unknown type": (added(member(f"{TOP}/x", type=b"Z")), "archive.member"),
    "a contiguous file": (edited(2, 156, b"7"), "archive.member"),
    "a sparse file": (edited(2, 156, tarfile.GNUTYPE_SPARSE), "archive.member"),
    "a sparse file, pax": (added(*pax(f"{TOP}/x", b"22 GNU.sparse.major=1\n")), "archive.member"),
    "a long link": (added(member("x", b"/etc", type=tarfile.GNUTYPE_LONGLINK)), "archive.member"),
    "a link, pax": (added(*pax(f"{TOP}/x", b"14 linkpath=/\n")), "archive.member"),
    "a global header": (added(member("x", b"14 mtime=1.25\n", type=tarfile.XGLTYPE)), "archive.member"),
    "a directory with data": (added(member(f"{TOP}/tokenizer", b"x", type=tarfile.DIRTYPE)), "archive.member"),
    "twice": (lambda data: joined([*blocks(data), blocks(data)[2]]), "archive.duplicate"),
    "the manifest twice": (lambda data: joined([*blocks(data), blocks(data)[0]]), "archive.duplicate"),
    "twice, once with ./": (lambda data: joined([*blocks(data), member(f"./{TOP}/README.md")]), "archive.duplicate"),
    "twice, once by pax": (added(*pax("x", path_record(f"{TOP}/README.md"))), "archive.duplicate"),
    "a directory twice": (added(*[member(f"{TOP}/tokenizer", type=tarfile.DIRTYPE)] * 2), "archive.duplicate"),
    "two bundles": (added(member("other/manifest.json")), "archive.name"),
    "no manifest": (lambda data: joined(blocks(data)[1:]), "file.missing"),
    "no architecture": (lambda data: joined(blocks(data)[:3] + blocks(data)[4:]), "file.missing"),
    "a manifest that is a directory": (
        lambda data: joined([member(f"{TOP}/manifest.json", type=tarfile.DIRTYPE), *blocks(data)[1:]]),
        "file.missing",
    ),
    "not listed": (added(member(f"{TOP}/evil.sh", b"rm")), "file.unlisted"),
    "not listed, a directory": (added(member(f"{TOP}/more", type=tarfile.DIRTYPE)), "file.unlisted"),
    "a file's name for a directory": (
        added(member(f"{TOP}/head.safetensors/", type=tarfile.DIRTYPE)),
        "archive.duplicate",
    ),
    "not listed, NUL": (added(*pax("x", path_record(f"{TOP}/a\0b"))), "file.unlisted"),
    "not a signature": (added(member(f"{TOP}/signatures/x.json", b"{}")), "file.unlisted"),
    "a signature below": (added(member(f"{TOP}/signatures/x/y.sigstore.json", b"{}")), "file.unlisted"),
    "a signature Con": (added(member(f"{TOP}/signatures/con.sigstore.json", b"{}")), "file.unlisted"),
    "65 signatures": (added(*[member(f"{TOP}/signatures/{i}.sigstore.json") for i in range(65)]), "archive.member"),
    "a larger manifest's file": (lambda data: joined([*blocks(data)[:2], *_resized(blocks(data)[2:])]), "file.size"),
    "a bit": (_one_bit, "file.digest"),
    "other sums": (_other_sums, "sums.mismatch"),
    "cut in a file": (lambda data: data[:100_000], "archive.truncated"),
    "cut between members": (lambda data: data[: len(joined(blocks(data)[:5])) - 10240], "archive.truncated"),
    "cut in a header": (lambda data: data[: len(joined(blocks(data)[:5])) - 10240 + 100], "archive.truncated"),
    "one block of zeros": (lambda data: joined(blocks(data))[: -10240 + 512], "archive.truncated"),
    "one block of zeros in between": (
        lambda data: joined(blocks(data)[:5])[: -10240 + 512] + joined(blocks(data)[5:]),
        "archive.trailing",
    ),
    "something at the end": (lambda data: data + b"x", "archive.trailing"),
    "another archive at the end": (lambda data: data + data, "archive.trailing"),
    "2 MiB of zeros": (lambda data: data + bytes(2**21), "archive.trailing"),
    "nothing": (lambda data: b"", "archive.truncated"),
    "zeros": (lambda data: bytes(10240), "file.missing"),
    "text": (lambda data: b"<html>Sign in</html>\n" * 100, "archive.header"),
    "a checksum": (lambda data: data[:148] + b"0000000\0" + data[156:], "archive.header"),
    "8 EiB": (edited(2, 124, b"\x80" + struct.pack(">3xQ", 2**63 - 1)), "archive.truncated"),
    "a negative size": (edited(2, 124, b"\xff" * 12), "archive.header"),
    "a size with an underscore": (edited(2, 124, b"000000_1151\0"), "archive.header"),
    "a size with a sign": (edited(2, 124, b"-0000001151\0"), "archive.header"),
    "no size": (edited(2, 124, bytes(12)), "archive.header"),
    "a long name of 1 GiB": (added(member("x", size=2**30, type=tarfile.GNUTYPE_LONGNAME)), "archive.name"),
    "a long name of 2 KiB": (added(member("x", b"y" * 2048, type=tarfile.GNUTYPE_LONGNAME)), "archive.name"),
    "two long names": (added(*[member("x", b"y" * 101, type=tarfile.GNUTYPE_LONGNAME)] * 2), "archive.header"),
    "a long name of nothing": (added(member("x", b"y" * 101, type=tarfile.GNUTYPE_LONGNAME)), "archive.header"),
    "a record's length": (added(*pax("x", b"99 path=y\n")), "archive.header"),
    "a record's length 0": (added(*pax("x", b"0 path=y\n")), "archive.header"),
    "a record without its end": (added(*pax("x", b"9 path=yz")), "archive.header"),
    "a record twice": (added(*pax("x", b"9 path=y\n9 path=z\n")), "archive.header"),
    "a record's size": (added(*pax(f"{TOP}/README.md", b"12 size=-1e3\n")), "archive.header"),
    "a record's size of 9 EB": (
        added(*pax(f"{TOP}/x", b"28 size=9223372036854775807\n")),
        "archive.truncated",
    ),
    "gzip": (lambda data: b"\x1f\x8b\x08" + bytes(600), "archive.kind"),
    "xz": (lambda data: b"\xfd7zXZ\0" + bytes(600), "archive.kind"),
    "zstd": (lambda data: b"\x28\xb5\x2f\xfd" + bytes(600), "archive.kind"),
    "bzip2": (lambda data: b"BZh9" + bytes(600), "archive.kind"),
    "zip": (lambda data: b"PK\x03\x04" + bytes(600), "archive.kind"),
}
"""A change of a good archive, and the code of what follows."""


def _resized(members: Blocks) -> Iterator[tuple[bytes, bytes]]:
    """README.md has another size than the listed one."""
    yield member(f"{TOP}/README.md", b"x")
    yield from members[1:]


@pytest.mark.rule("SB-D-022")
@pytest.mark.parametrize("case", HOSTILE)
def test_archives_from_strangers_are_refused(case: str, packed: bytes, tmp_path: Path) -> None:
    change, code = HOSTILE[case]
    (tmp_path / "x.tar").write_bytes(change(packed))
    with pytest.raises(BundleError) as caught:
        splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out")
    assert set(caught.value.codes) == {code}, caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_the_cases_start_from_a_good_archive(packed: bytes, tmp_path: Path) -> None:
    """So each of them is refused because of its change."""
    (tmp_path / "x.tar").write_bytes(joined(blocks(packed)))
    splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out").verify(exact=True, whole=True)
    (tmp_path / "x.tar").write_bytes(added(*pax("x", path_record(f"{TOP}/signatures/a.sigstore.json")))(packed))
    splitbundle.unpack(tmp_path / "x.tar", tmp_path / "more")
    assert (tmp_path / "more" / "signatures" / "a.sigstore.json").is_file()


@pytest.mark.rule("SB-D-022")
def test_an_old_bundle_survives_a_bad_archive(packed: bytes, tmp_path: Path) -> None:
    bundle = splitbundle.open(shutil.copytree(GOLDEN, tmp_path / "b.splitbundle"))
    before = digests(bundle.path)
    (tmp_path / "x.tar").write_bytes(_one_bit(packed))
    with pytest.raises(BundleError, match=r"\[file\.digest\]"):
        splitbundle.unpack(tmp_path / "x.tar", bundle.path, force=True)
    assert digests(bundle.path) == before
    (tmp_path / "x.tar").write_bytes(packed)
    with pytest.raises(BundleError, match=r"\[output\.exists\]"):
        splitbundle.unpack(tmp_path / "x.tar", bundle.path)
    assert splitbundle.unpack(tmp_path / "x.tar", bundle.path, force=True).id == bundle.id
    assert digests(bundle.path) == digests(GOLDEN)
    with pytest.raises(BundleError, match=r"\[file\.digest\] manifest\.json: expected the bundle id 'sha256:0"):
        splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out", id="sha256:" + "0" * 64)


@pytest.mark.rule("SB-D-022")
def test_the_id_is_checked_before_the_manifest_is_parsed(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(joined([member(f"{TOP}/manifest.json", b"{" * 1000)]))
    with pytest.raises(BundleError, match=r"\[file\.digest\] manifest\.json"):
        splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out", id="sha256:" + "0" * 64)
    with pytest.raises(BundleError, match=r"\[json\."):
        splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out")


@pytest.mark.rule("SB-D-022")
def test_any_cut_and_any_bit_is_refused_or_harmless(packed: bytes, tmp_path: Path) -> None:
    """A bit in the padding of a file may change. Nothing that is unpacked may."""
    place, wanted = tmp_path / "x.tar", digests(GOLDEN)
    draw, codes = random.Random(0), set[str]()
    end = len(joined(blocks(packed))) - 10240
    for cut in sorted(draw.sample(range(end + 1024), 60)):
        place.write_bytes(packed[:cut])
        with pytest.raises(BundleError) as caught:
            splitbundle.unpack(place, tmp_path / "out")
        assert set(caught.value.codes) <= {"archive.truncated"}, (cut, caught.value)
    headers = [packed.index(header) + draw.randrange(512) for header, _ in blocks(packed) for _ in range(8)]
    for at in (*headers, *(draw.randrange(len(packed)) for _ in range(60))):
        changed = bytearray(packed)
        changed[at] ^= 1 << draw.randrange(8)
        place.write_bytes(changed)
        try:
            made = splitbundle.unpack(place, tmp_path / "out", force=True)
        except BundleError as error:
            codes.update(error.codes)
        else:
            assert digests(made.path) == wanted
    assert {code.partition(".")[0] for code in codes} <= {"archive", "field", "file", "json", "sums", "manifest"}
    assert {"archive.header", "file.digest"} <= codes
    assert {path.name for path in tmp_path.iterdir()} <= {"x.tar", "out"}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name, code in (("pipe", "archive.kind"), ("directory", "archive.kind"), ("nothing", "file.missing")):
        with pytest.raises(BundleError) as caught:
            splitbundle.unpack(tmp_path / name, tmp_path / "out")
        assert caught.value.codes == (code,), name
    with pytest.raises(BundleError, match=r"\[file\.unreadable\]"):
        splitbundle.unpack("a\0b", tmp_path / "out")


# Time and memory.


def _many(count: int) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        block = archives._header("x/y", 0)
        with place.open("wb") as out:
            for i in range(count):
                out.write(resealed(block, 0, b"x/%06d" % i))
            out.write(bytes(10240))

    return make


def _hollow(size: int, name: str = "x/manifest.json", trailing: int = 0) -> Callable[[Path], object]:
    """A member that is a hole in the file: it takes no room on the disk."""

    def make(place: Path) -> None:
        place.write_bytes(archives._header(name, size))
        os.truncate(place, 512 + -(-size // 512) * 512 + 1024 + trailing)

    return make


LARGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "too many members": (_many(2**15 + 1), "archive.member"),
    "the most members": (_many(2**15), "file.missing"),
    "a manifest of 8 TiB": (_hollow(2**43), "json.size"),
    "another file of 8 TiB": (_hollow(2**43, "x/y"), "file.missing"),
    "8 TiB of zeros at the end": (_hollow(0, "x/y", 2**43), "archive.trailing"),
}
CHILD = """
import json, resource, sys
sys.path[:0] = json.loads(sys.argv[1])
import splitbundle
from splitbundle.sharing import archive
resource.setrlimit(resource.RLIMIT_AS, (256 * 2**20, 256 * 2**20))
try:
    splitbundle.unpack(sys.argv[2], sys.argv[3])
except splitbundle.BundleError as error:
    print(*error.codes)
"""


@pytest.mark.rule("SB-D-022")
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
@pytest.mark.parametrize("case", LARGE)
def test_large_archives_are_refused_soon_and_in_little_memory(case: str, tmp_path: Path) -> None:
    make, code = LARGE[case]
    try:
        make(tmp_path / "x.tar")
    except OSError:
        pytest.skip("the file system has no files of this size")
    with at_most(20, parsing, 2**24), pytest.raises(BundleError) as caught:
        splitbundle.unpack(tmp_path / "x.tar", tmp_path / "out")
    assert caught.value.codes == (code,)
    command = [sys.executable, "-c", CHILD, json.dumps(sys.path), str(tmp_path / "x.tar"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.stdout.split(), done.stderr) == ([code], "")
