"""Option values that the converter's functions and its commands share."""

from __future__ import annotations

from typing import Final

from splitbundle.format import dtypes

DTYPES: Final = ("keep", *dtypes.WEIGHTS)
