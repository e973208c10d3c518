"""The token of the environment, for the host of a reference."""

from __future__ import annotations

import os
from typing import Final

from splitbundle.errors import wrong_argument

TOKEN: Final = "SPLITBUNDLE_TOKEN"  # noqa: S105  # the name of a variable


def bearer() -> str | None:
    """Return the header Authorization of the token in ``SPLITBUNDLE_TOKEN``, or None. No message shows the token.

    Raises:
        BundleError: ``input.value`` for a token with characters that no header may have.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        return None
    if not token.isascii() or not token.isprintable() or " " in token:
        raise wrong_argument(TOKEN, "a token of printable ASCII without spaces", "other characters")
    return f"Bearer {token}"
