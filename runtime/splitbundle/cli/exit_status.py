"""The exit statuses of the command ``splitbundle`` (docs/contributing/command-line.md has the list)."""

from __future__ import annotations

from typing import Final

from splitbundle.errors import BundleError, MissingExtra, VerificationError

OK: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
NOT_VERIFIED: Final = 3
MISSING_EXTRA: Final = 4
NETWORK: Final = 5
INTERRUPTED: Final = 130


def exit_status(error: BundleError) -> int:
    """Return the exit status for an error."""
    if isinstance(error, MissingExtra):
        return MISSING_EXTRA
    if isinstance(error, VerificationError):
        return NOT_VERIFIED
    if any(code.partition(".")[0] in ("network", "remote", "peer", "server", "cluster") for code in error.codes):
        return NETWORK
    if all(code.startswith("usage.") or code == "stage.name" for code in error.codes):
        return USAGE
    return FAILURE
