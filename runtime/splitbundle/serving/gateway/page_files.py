"""The files of the page, and those of onnxruntime-web: read when a gateway starts, and held in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.records import record

PAGE: Final = "browser"
"""The folder of the page: inside the package where it was installed, and beside it in a checkout."""
START: Final = "page/"
"""The path of the page that is shown."""
ONNXRUNTIME: Final = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
"""The files of onnxruntime-web that the page needs."""
FOUND: Final = Path("node_modules", "onnxruntime-web")
"""Where npm puts onnxruntime-web, below the working directory."""
_INDEX: Final = "index.html"
_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
"""The end of a name -> the media type. Files of other ends aren't served."""


@record(frozen=True, slots=True, kw_only=True)
class PageFile:
    """A file in memory."""

    data: bytes
    kind: str
    tag: str
    """Its digest, as the validator of HTTP."""


def page_files() -> dict[str, PageFile]:
    """Return the files of the page by their paths.

    Raises:
        BundleError: ``file.missing`` where the page isn't installed.
    """
    inside = resources.files("splitbundle") / PAGE
    beside = Path(__file__).resolve().parents[3] / PAGE
    root: Any = inside if inside.is_dir() else beside
    if not (root / "page").is_dir():
        expected, got = "the page, which is installed with splitbundle", "a package without it"
        raise BundleError(Problem(code="file.missing", file=PAGE, expected=expected, got=got))
    found = dict(_files(root, ""))
    found[START] = found[f"{START}{_INDEX}"]
    return found


def onnxruntime_files(directory: str | None) -> Mapping[str, PageFile]:
    """Return the files of onnxruntime-web by their names; none if no directory is given and npm has installed none.

    Args:
        directory: the package, or its folder ``dist``.

    Raises:
        BundleError: ``file.missing`` for a directory without them.
    """
    package = Path(directory) if directory is not None else FOUND
    for root in (package / "dist", package):
        if all((root / name).is_file() for name in ONNXRUNTIME):
            return {name: _file((root / name).read_bytes(), name) for name in ONNXRUNTIME}
    if directory is None:
        return {}
    expected = f"a directory with {', '.join(ONNXRUNTIME)}, itself or in dist"
    hint = "npm install onnxruntime-web makes node_modules/onnxruntime-web"
    raise BundleError(Problem(code="file.missing", file=directory, expected=expected, got="another one", hint=hint))


def _files(root: Any, path: str) -> Iterator[tuple[str, PageFile]]:
    for each in sorted(root.iterdir(), key=lambda each: str(each.name)):
        if each.is_dir():
            yield from _files(each, f"{path}{each.name}/")
        elif each.name[each.name.rfind(".") :] in _KINDS:
            yield f"{path}{each.name}", _file(each.read_bytes(), each.name)


def _file(data: bytes, name: str) -> PageFile:
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    return PageFile(data=data, kind=_KINDS[name[name.rfind(".") :]], tag=tag)
