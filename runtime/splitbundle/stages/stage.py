"""The base of the stages of every backend: its part of the model, and the checks at its boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, NoReturn

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.integers import as_integer
from splitbundle.stages.call import CacheState, Call, named_rows

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.storage.reader import BundleReader

MAX_LOGITS = 2**20
LogitsWanted = Literal["all", "last"] | int
Array = Any
"""A tensor or array of the backend."""


class ArrayInfo(NamedTuple):
    """The shape, dtype and device of an array from a caller, as its backend names them."""

    shape: tuple[int, ...]
    dtype: str
    device: str


class StageBase:
    """A part of the model. The first stage takes token ids, the others ``hidden``; the last one returns logits."""

    backend: ClassVar[str]
    array: ClassVar[str]
    """The name of an array, for messages."""
    integer_dtypes: ClassVar[frozenset[str]]
    takes_rows: ClassVar[bool] = False
    """Whether a call may compute some rows of a cache, as ``Call.rows`` names them."""

    name: str
    fingerprint: str
    """The fingerprint of the model that the weights came from. Training doesn't change it."""
    layer_range: tuple[int, int]
    architecture: Architecture
    embeds: bool
    has_head: bool

    def describe(self, bundle: BundleReader, selection: Selection) -> None:
        """Set what says which part of which model this stage is.

        Args:
            bundle: the bundle.
            selection: the part, from ``bundle.select(…)``.
        """
        self.name = selection.name
        self.fingerprint = bundle.fingerprint
        self.source = str(bundle.path), bundle.id
        self.layer_range = selection.layers
        self.architecture, self.source_names = bundle.architecture, bundle.manifest.source_names
        self.embeds, self.has_head = selection.embeds, selection.head

    # Each backend defines these.

    def _info(self, array: object) -> ArrayInfo | None:
        """Return the shape, dtype and device of an array of this backend; None for any other object."""
        raise NotImplementedError

    def _min_max(self, array: Array) -> tuple[int, int]:
        """Return the smallest and the largest of some integers."""
        raise NotImplementedError

    def _expected(self) -> ArrayInfo:
        """Return the dtype and the device of this stage; the shape is empty."""
        raise NotImplementedError

    def _call(self, past: Sequence[int], count: Sequence[int], length: int) -> Call:
        """Return a call in the form of this backend."""
        return Call(past, count, length)

    def convert_call(self, call: Call) -> Call:
        """Return a call of another stage in the form of this one."""
        return call

    def over_numpy(self) -> StageBase:
        """Return a stage that computes the same over numpy arrays; this stage itself if it does so already."""
        return self

    # Every backend shares these.

    def cache(self, batch_size: int, capacity: int) -> Any:
        """Return an empty KV cache for this stage's layers.

        Args:
            batch_size: the number of rows.
            capacity: the number of tokens that each row has room for.

        Raises:
            BundleError: ``input.value`` for a wrong number of rows; ``session.capacity`` for more positions than the
                model has, or than memory can hold.
        """
        rows, slots = as_integer(batch_size), as_integer(capacity)
        if rows is None or rows < 1:
            expected, got = "a number from 1", quoted(batch_size)
            raise BundleError(Problem(code="input.value", argument="batch_size", expected=expected, got=got))
        limit = self.architecture.position_limit
        if slots is None or not 1 <= slots <= (limit or slots):
            expected = f"1 to {limit}, the positions of the model" if limit else "at least 1"
            raise BundleError(
                Problem(code="session.capacity", argument="capacity", expected=expected, got=quoted(capacity))
            )
        try:
            return self._make_cache(rows, slots)
        # Allocators raise any of these, and nothing more precise.
        except (RuntimeError, MemoryError, ValueError, OverflowError) as error:
            expected, got = "slots that memory can hold", f"{capacity} in {batch_size} rows: {str(error)[:100]}"
            raise BundleError(
                Problem(code="session.capacity", argument="capacity", expected=expected, got=got)
            ) from error

    def check(
        self,
        inputs: Array,
        *,
        past: Any = None,
        count: Any = None,
        cache: Any = None,
        logits: LogitsWanted = "all",
        rows: Any = None,
    ) -> Any:
        """Check that a call can be computed, and return its positions.

        Nothing is written, so a refusal never changes a cache.

        Args:
            inputs: token ids, or hidden states for a stage that doesn't embed. *Shape:* (batch, sequence) of integers,
                or (batch, sequence, hidden) of the stage's dtype.
            past: for each row, the number of tokens that the cache already has; by default 0.
            count: for each row, the number of its tokens in this call, which come first; by default all of them.
            cache: the cache of this stage, or None.
            logits: ``"all"``, ``"last"``, or the number of last positions; for a stage with the head.
            rows: for each row of the call, the row of the cache that it is; by default the same one.

        Returns:
            The positions of the call: a ``Call``.

        Raises:
            BundleError: ``input.*``; ``session.capacity`` if the cache has no room.
        """
        self._check_inputs(inputs)
        batch, length = inputs.shape[:2]
        named = None if rows is None else self._named(rows, batch, cache)
        if past is None and count is None and cache is None and rows is None and self._is_traced():
            batch = (
                1  # one row stands for all, which are alike: otherwise a program would hold for one batch size alone
            )
        before = self._rows("past", past, batch, 0, 0, 2**31)
        brought = self._rows("count", count, batch, length, 0, length)
        if cache is None and any(before):
            self._refuse("input.position", "past", "0 for every row without a cache", quoted(before))
        call = self._call(before, brought, max(1, *brought))
        call.rows = named
        limit = self.architecture.position_limit
        if self.embeds and limit is not None and call.stop > limit:
            expected = f"at most {limit}, the positions of the model"
            self._refuse("input.position", "past + count", expected, f"{call.stop}")
        self.check_call(inputs, call, cache, logits)
        return call

    def check_call(self, inputs: Array, call: Call, cache: Any, logits: LogitsWanted = "all") -> None:
        """Do the part of ``check`` that every stage of a pipeline must do itself.

        Args:
            inputs: the inputs of the pipeline, which are those of this stage only if it is the first one.
            call: the positions, as ``check`` of the first stage returned them.
            cache: the cache of this stage, or None.
            logits: as for ``check``.

        Raises:
            BundleError: ``input.cache``, ``input.position`` or ``session.capacity`` of the cache; ``input.value``.
        """
        if cache is not None:
            self._check_cache(cache)
            cache.check(call)
        if self.has_head:
            self._logits_wanted(logits)

    # These two are right for a stage whose keys and values aren't here. A stage that keeps them has its own.

    def _is_traced(self) -> bool:
        """Return whether this call becomes a program, for inputs of other sizes too."""
        return False

    def _make_cache(self, batch_size: int, capacity: int) -> CacheState:
        return CacheState(self.architecture, self.layer_range, batch_size, capacity)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, CacheState) or cache.layers != self.layer_range:
            got = f"one of layers {cache.layers}" if isinstance(cache, CacheState) else type(cache).__name__
            self._refuse("input.cache", "cache", f"a cache of layers {self.layer_range}", got)

    def _logits_wanted(self, logits: LogitsWanted) -> int | None:
        if logits == "all":
            return None
        if logits == "last":
            return 1
        wanted = as_integer(logits)
        if wanted is None or not 1 <= wanted <= MAX_LOGITS:
            self._refuse("input.value", "logits", f'"all", "last" or a number from 1 to {MAX_LOGITS}', quoted(logits))
        return wanted

    def _check_inputs(self, inputs: object) -> None:
        name = "token ids" if self.embeds else f"hidden at layer {self.layer_range[0]}"
        given, own = self._info(inputs), self._expected()
        if given is None:
            self._refuse("input.type", name, self.array, type(inputs).__name__)
        if given.device != own.device:
            hint = "Move it with .to(...), or open the stage with device="
            self._refuse("input.device", name, f"{own.device}, where this stage is", given.device, hint)
        if self.embeds:
            if given.dtype not in self.integer_dtypes:
                self._refuse("input.dtype", name, "an integer dtype", given.dtype)
            if len(given.shape) != 2 or 0 in given.shape:
                self._refuse("input.shape", name, "(batch, sequence), both above 0", str(given.shape))
            low, high = self._min_max(inputs)
            if low < 0 or high >= self.architecture.vocab_size:
                got = str(low if low < 0 else high)
                self._refuse("input.value", name, f"ids from 0 to {self.architecture.vocab_size - 1}", got)
        else:
            if given.dtype != own.dtype:
                self._refuse(
                    "input.dtype", name, f"{own.dtype}, as this stage computes", given.dtype, self._other_dtype()
                )
            width = self.architecture.hidden_size
            if len(given.shape) != 3 or 0 in given.shape or given.shape[2] != width:
                hint = "It must be the output of the stage before, of the same model"
                self._refuse("input.shape", name, f"(batch, sequence, {width})", str(given.shape), hint)

    def _other_dtype(self) -> str:
        """Return the hint for hidden states in another dtype."""
        raise NotImplementedError

    def _rows(self, name: str, given: Any, batch: int, default: int, low: int, high: int) -> list[int]:
        if given is None:
            return [default] * batch
        array = self._info(given)
        if array is not None and (array.dtype not in self.integer_dtypes or len(array.shape) != 1):
            self._refuse("input.dtype", name, "(batch) of an integer dtype", f"{array.dtype} {array.shape}")
        if array is None and not isinstance(given, Sequence):
            self._refuse("input.type", name, f"a number for each row, or {self.array}", type(given).__name__)
        values = list(given) if array is None else given.tolist()
        if len(values) != batch:
            self._refuse("input.shape", name, f"{batch} rows, as the tokens", f"{len(values)}")
        found = [n for n in map(as_integer, values) if n is not None and low <= n <= high]
        if len(found) < len(values):
            self._refuse("input.value", name, f"integers from {low} to {high}", quoted(values))
        return found

    def _named(self, rows: Any, batch: int, cache: Any) -> tuple[int, ...]:
        if cache is None:
            self._refuse("input.value", "rows", "no rows without a cache, whose rows they are", quoted(rows))
        named = named_rows(rows)
        if len(named) != batch:
            self._refuse("input.shape", "rows", f"{batch} rows, as the tokens", f"{len(named)}")
        return named

    def _refuse(self, code: str, argument: str, expected: str, got: str, hint: str | None = None) -> NoReturn:
        where = f"stage {self.name}, {argument}"
        raise BundleError(Problem(code=code, argument=where, expected=expected, got=got, hint=hint))
