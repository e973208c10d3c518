"""What a pipeline needs of a stage: any object that keeps this contract can be one."""

from __future__ import annotations

from typing import Any, Final, Protocol

from splitbundle.errors import BundleError, Problem
from splitbundle.format.architecture.decoder import Architecture


class StageContract(Protocol):
    """A part of a model, as a pipeline uses it.

    ``TensorStage`` and ``ArrayStage`` of ``splitbundle.extending`` have the checks already: ``check``, ``check_call``
    and ``cache``. A stage that wraps another one can hand everything on to it.

    A pipeline of torch gives and takes tensors in the stage's ``dtype`` on its ``device``. A pipeline of numpy arrays
    gives and takes float32. If a stage has a method ``over_numpy()``, such a pipeline uses what it returns. If it has
    ``convert_call(call)``, a pipeline converts positions with it.
    """

    name: str
    """The name, for messages."""
    fingerprint: str
    """The fingerprint of the model that the weights came from."""
    layer_range: tuple[int, int]
    """The first layer, and the last one plus one."""
    architecture: Architecture
    embeds: bool
    """Whether it takes token ids, in place of hidden states."""
    has_head: bool
    """Whether it returns logits, in place of hidden states."""

    def cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty cache: a ``CacheState``, or an object with all of its attributes and methods.

        Args:
            batch_size: the number of rows.
            capacity: the number of tokens that each row has room for.
        """

    def check(self, inputs: Any, *, past: Any = None, count: Any = None, cache: Any = None, logits: Any = "all") -> Any:
        """Check a call before anything is written, and return its positions: a ``Call``. Only the first stage needs it.

        Args:
            inputs: what the user gives: token ids, or hidden states for a pipeline that doesn't embed.
            past: for each row, the number of earlier tokens; by default 0.
            count: for each row, the number of its tokens in this call; by default all.
            cache: the cache of this stage, or None.
            logits: ``"all"``, ``"last"``, or a number of last positions.

        Raises:
            BundleError: the call can't be computed.
        """

    def check_call(self, inputs: Any, call: Any, cache: Any, logits: Any = "all") -> None:
        """Check what this stage must check itself, before any stage of the pipeline has written anything.

        Args:
            inputs: the inputs of the pipeline, which aren't those of this stage unless it is the first one.
            call: the positions: ``call.past`` and ``call.count`` for each row.
            cache: the cache of this stage, or None.
            logits: as for ``check``.

        Raises:
            BundleError: the call can't be computed.
        """

    def __call__(self, inputs: Any, *, positions: Any, cache: Any = None, logits: Any = "all") -> Any:
        """Compute the stage, and extend the cache: ``cache.advance(positions)``.

        *Shape:* token ids (batch, sequence), or hidden (batch, sequence, hidden) -> hidden, or logits (batch, k,
        vocab). Row b has ``positions.count[b]`` tokens, after ``positions.past[b]`` earlier ones. The results of
        padding are zeros.

        Args:
            inputs: token ids, or the result of the stage before.
            positions: the ``Call`` that was checked.
            cache: the cache of this stage, or None.
            logits: as for ``check``; only a stage with the head gets another value than ``"all"``.
        """


_NEEDED: Final = (
    *("name", "fingerprint", "layer_range", "architecture", "embeds", "has_head"),
    *("cache", "check_call", "__call__"),
)


def check_contract(stage: Any, argument: str) -> None:
    """Check that an object has what a pipeline needs of a stage.

    Raises:
        BundleError: ``pipeline.stage``, which names what it lacks.
    """
    missing = [name for name in _NEEDED if not hasattr(stage, name)]
    if getattr(stage, "embeds", False) and not hasattr(stage, "check"):
        missing.append("check")
    if missing:
        expected = "a stage, or an object that keeps the contract of one"
        got = f"{type(stage).__name__}, without {', '.join(missing)}"
        hint = "splitbundle.extending.StageContract lists what a stage has"
        raise BundleError(Problem(code="pipeline.stage", argument=argument, expected=expected, got=got, hint=hint))
