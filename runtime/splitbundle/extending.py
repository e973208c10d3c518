"""Write stages of your own: the contract of a stage, and the halves that have the checks already.

The first use of a name imports what it needs: ``TensorStage`` torch, ``ArrayStage`` numpy.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from splitbundle.backends.onnxruntime.arrays import ArrayStage
    from splitbundle.backends.torch.tensors import TensorStage
    from splitbundle.stages.call import CacheState, Call
    from splitbundle.stages.contract import StageContract

__all__ = ["ArrayStage", "CacheState", "Call", "StageContract", "TensorStage"]


if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "TensorStage":
            from splitbundle.backends import registry

            found = registry.module("torch", "tensors").TensorStage
        elif name == "ArrayStage":
            from splitbundle.backends import registry

            found = registry.module("onnxruntime", "arrays").ArrayStage
        elif name == "StageContract":
            from splitbundle.stages import contract

            found = contract.StageContract
        else:
            from splitbundle.stages import call

            found = getattr(call, name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
