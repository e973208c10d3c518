"""splitbundle: run or train a part of a transformer. It needs only torch, or only onnxruntime.

    bundle = splitbundle.open("gpt2.splitbundle")
    logits = bundle.pipeline()(token_ids)

Importing splitbundle loads no backend, and little more than the errors of this package. The rest loads on first use.
``Bundle.stage`` and ``Bundle.pipeline`` import their backend.
"""

from __future__ import annotations

from splitbundle.errors import BundleError, MissingExtra, ParityError, Problem, VerificationError
from splitbundle.version import __version__

TYPE_CHECKING = False  # type checkers treat it as true; importing typing would be most of this import's time
if TYPE_CHECKING:
    from typing import Any

    from splitbundle.boundary_bytes import pack_boundary, unpack_boundary
    from splitbundle.bundle import Bundle
    from splitbundle.format.selection import Selection
    from splitbundle.opening import merge_bundles as merge
    from splitbundle.opening import open_bundle as open  # noqa: A004  # users write splitbundle.open
    from splitbundle.opening import pull_bundle as pull
    from splitbundle.opening import push_bundle as push
    from splitbundle.opening import unpack_archive as unpack
    from splitbundle.serving.stage_server import StageServer
    from splitbundle.stages.shared_pipeline import SharedPipeline
    from splitbundle.verification.verify import Verification

__all__ = [
    "Bundle",
    "BundleError",
    "MissingExtra",
    "ParityError",
    "Problem",
    "Selection",
    "SharedPipeline",
    "StageServer",
    "Verification",
    "VerificationError",
    "__version__",
    "merge",
    "open",
    "pack_boundary",
    "pull",
    "push",
    "unpack",
    "unpack_boundary",
]

_LATER = {
    "Bundle": ("splitbundle.bundle", "Bundle"),
    "Selection": ("splitbundle.format.selection", "Selection"),
    "SharedPipeline": ("splitbundle.stages.shared_pipeline", "SharedPipeline"),
    "StageServer": ("splitbundle.serving.stage_server", "StageServer"),
    "Verification": ("splitbundle.verification.verify", "Verification"),
    "merge": ("splitbundle.opening", "merge_bundles"),
    "open": ("splitbundle.opening", "open_bundle"),
    "pack_boundary": ("splitbundle.boundary_bytes", "pack_boundary"),
    "pull": ("splitbundle.opening", "pull_bundle"),
    "push": ("splitbundle.opening", "push_bundle"),
    "unpack": ("splitbundle.opening", "unpack_archive"),
    "unpack_boundary": ("splitbundle.boundary_bytes", "unpack_boundary"),
}
"""A public name -> the module that defines it, imported at first use, and its name there."""


if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module, own = _LATER[name]
        found = globals()[name] = getattr(import_module(module), own)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
