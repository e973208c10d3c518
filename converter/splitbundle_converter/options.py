"""Option values that the converter's functions and its commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from splitbundle.format import dtypes

QUANTIZED: Final = ("int8", "int4")
"""What the matrices of a bundle can be quantized to."""
DTYPES: Final = ("keep", *dtypes.WEIGHTS)
CHECKS: Final = ("whole", "layers", "none")
"""How a conversion is checked: with the whole original model in memory, with one layer of it at a time, or not."""
MAX_SHARD_SIZE: Final = 5 * 10**9
"""The default size in bytes above which an export writes the weights as several files."""
Note: TypeAlias = Callable[[str], None]
"""A function that is called with a sentence for each thing that a conversion accepted, skipped or could not do."""
