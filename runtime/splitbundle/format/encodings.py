"""Encodings of quantized weights: what is stored for a matrix (``spec/v1/bundle.md``, section "Encodings")."""

from __future__ import annotations

import re
from typing import Final

from splitbundle.format.weight_layout import SCALE, Tensor
from splitbundle.records import record

COLUMNS: Final = 16
"""The number of columns of a ``rows8`` matrix is a multiple of this."""
ROWS: Final = 16
"""The number of rows of a ``blocks4`` matrix is a multiple of this."""
SCALE_DTYPE: Final = "bfloat16"


@record(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How the numbers of a matrix are stored: each is a code times a scale."""

    name: str
    extension: str
    """The name that ``requires`` has if a tensor has this encoding."""
    bits: int
    """Bits of one code."""
    block: int | None
    """How many numbers of a row share a scale; None for all of them."""

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a matrix, or a stack of matrices, of this shape can have the encoding."""
        if len(shape) not in (2, 3):
            return False
        return shape[-1] % (self.block or COLUMNS) == 0 and (self.block is None or shape[-2] % ROWS == 0)

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the stored tensors of a matrix, by name: its codes, and its scales."""
        if self.block is None:
            codes, scales = Tensor(dtype="int8", shape=shape), shape[:-1]
        else:
            scales = (*shape[:-1], shape[-1] // self.block)
            codes = Tensor(dtype="uint8", shape=(*scales, self.block // 2))
        return {name: codes, f"{name}{SCALE}": Tensor(dtype=SCALE_DTYPE, shape=scales)}


TABLE: Final = {
    encoding.name: encoding
    for encoding in (
        Encoding(name="rows8", extension="rows8", bits=8, block=None),
        *(Encoding(name=f"blocks4_{size}", extension="blocks4", bits=4, block=size) for size in (32, 64, 128)),
    )
}
"""Name -> encoding."""
EXTENSIONS: Final = tuple(dict.fromkeys(encoding.extension for encoding in TABLE.values()))
_MATRIX: Final = re.compile(
    r"embedding\.(token|projection)\.weight|head\.(narrowing|projection)\.weight"
    r"|layers\.\d+\.(attention\.(query|key|value|gate|output)|mlp\.((experts|shared)\.)?(gate|up|down))\.weight"
)


def is_matrix(name: str) -> bool:
    """Return whether a logical tensor may be encoded: the weight of a linear layer or of experts, or the table."""
    return _MATRIX.fullmatch(name) is not None
