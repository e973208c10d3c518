"""Run a program where one backend is the only library: ``barred LIBRARY PROGRAM …``, or ``barred LIBRARY -m MODULE …``.

The program can import splitbundle, the standard library, and ``torch`` or ``onnxruntime`` with the libraries that it
requires. No other module is found, as in an environment that lacks the library. ``onnxruntime,text`` adds the libraries
of the extra ``text``.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

ALLOWED = {
    "torch": {
        "torch", "torchgen", "functorch",
        "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions",
    },
    "onnxruntime": {"onnxruntime", "flatbuffers", "google", "numpy", "packaging"},
    "numpy": {"numpy"},
    "text": {"tokenizers", "jinja2", "markupsafe"},
}  # fmt: skip


class Only:
    """A finder of modules that finds some packages alone."""

    def __init__(self, finder: Any, allowed: set[str]) -> None:
        self.finder = finder
        self.allowed = allowed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return None for a module that is barred, as if it weren't installed."""
        return self.finder.find_spec(name, path, target) if name.partition(".")[0] in self.allowed else None


def main() -> None:
    """Bar what isn't allowed, and run the program with its own arguments."""
    libraries, sys.argv = sys.argv[1].split(","), sys.argv[2:]
    allowed = {"splitbundle"} | sys.stdlib_module_names
    allowed = allowed.union(*(ALLOWED[library] for library in libraries))
    for name in list(sys.modules):  # an environment may import some modules at its start
        if not name.startswith("_") and name.partition(".")[0] not in allowed:
            del sys.modules[name]
    sys.meta_path[:] = [Only(finder, allowed) for finder in sys.meta_path]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
