"""splitbundle: run or train a part of a transformer, with torch alone, or with onnxruntime alone.

    bundle = splitbundle.open("gpt2.splitbundle")
    logits = bundle.pipeline()(token_ids)

Importing this imports no backend; ``Bundle.stage`` and ``Bundle.pipeline`` import theirs.
"""

from __future__ import annotations

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, MissingExtra, ParityError, Problem, VerificationError
from splitbundle.opening import open_bundle as open  # noqa: A004  # the name reads as it should: splitbundle.open
from splitbundle.selections import Selection
from splitbundle.verification import Verification
from splitbundle.version import __version__

__all__ = [
    "Bundle",
    "BundleError",
    "MissingExtra",
    "ParityError",
    "Problem",
    "Selection",
    "Verification",
    "VerificationError",
    "__version__",
    "open",
]
