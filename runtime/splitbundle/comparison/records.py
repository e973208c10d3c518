"""The result of a comparison of two bundles, A and B. ``as_json`` gives the output of ``splitbundle diff --json``."""

from __future__ import annotations

from typing import Any, Final

from splitbundle.format.manifest.document import File, Storage
from splitbundle.format.weight_layout import Tensor
from splitbundle.records import as_dict, record

ASPECTS: Final = ("model", "cuts", "facts", "weights", "tokenizer", "vectors", "files")
"""The aspects of a bundle that can be compared. They are the names of the members of ``Comparison``, too."""
SAME_BUNDLE: Final = "same_bundle"
SAME_MODEL: Final = "same_model"
B_CHANGED_FROM_A: Final = "b_changed_from_a"
A_CHANGED_FROM_B: Final = "a_changed_from_b"
CHANGED_FROM_ONE: Final = "changed_from_one"
SAME_ARCHITECTURE: Final = "same_architecture"
OTHER_MODEL: Final = "other_model"
ABSENT: Final = "absent"
NO_TORCH: Final = "no_torch"


@record(frozen=True, slots=True, kw_only=True)
class Identity:
    """The digests and the origin of one bundle."""

    bundle_id: str
    fingerprint: str
    parent: str | None
    architecture_id: str
    name: str
    family: str
    source: str
    revision: str | None


@record(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """A field of a document that differs."""

    pointer: str
    """The RFC 6901 pointer into the document. An array is compared as one value."""
    a: Any
    b: Any
    only_in: str | None
    """``"a"`` or ``"b"`` if only this document has the field. The other value is None then."""


@record(frozen=True, slots=True, kw_only=True)
class Fields:
    """The fields of a document that differ."""

    changes: tuple[FieldChange, ...]

    @property
    def differs(self) -> bool:
        """Return whether any field differs."""
        return bool(self.changes)


@record(frozen=True, slots=True, kw_only=True)
class FileChange:
    """A listed file that differs by its digest, or that only one of the manifests lists."""

    path: str
    a: File | None
    b: File | None


@record(frozen=True, slots=True, kw_only=True)
class ShardOutline:
    """A shard without the names of its files."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    variant: str | None
    """The variant of the shard's graph; None without a graph."""
    opset: int | None


@record(frozen=True, slots=True, kw_only=True)
class Cutting:
    """The cuts of a bundle, and its shards in order."""

    cuts: tuple[int, ...]
    shards: tuple[ShardOutline, ...]


@record(frozen=True, slots=True, kw_only=True)
class Cuts:
    """How each bundle is cut."""

    a: Cutting
    b: Cutting

    @property
    def differs(self) -> bool:
        """Return whether cuts, names of shards or graphs differ."""
        return self.a != self.b


@record(frozen=True, slots=True, kw_only=True)
class Values:
    """How far the values of a tensor in B are from those in A. They are compared in float64, value by value.

    NaN at the same place in both is no difference. Zeros of different signs are one.
    """

    count: int
    """The number of values of the tensor."""
    differing: int
    """The number of values that differ."""
    not_finite: int
    """The number of the differing values that are NaN or infinite in A or B. ``largest`` leaves them out."""
    largest: float
    """The largest absolute difference of two finite values."""
    scale: float
    """The largest magnitude of a finite value in A."""
    relative: float | None
    """``largest`` as a fraction of ``scale``; None if ``scale`` is 0."""


@record(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """A tensor that only one bundle has, that has another shape, or that has other values."""

    name: str
    a: Tensor | None
    b: Tensor | None
    values: Values | None
    """None if the tensor isn't in both bundles with one shape."""


@record(frozen=True, slots=True, kw_only=True)
class UnitChange:
    """A unit whose files differ by their digests, or that only one bundle has."""

    unit: str
    layer: int | None
    """The number of the global layer; None for the embedding and the head."""
    only_in: str | None
    """``"a"`` or ``"b"`` if only this bundle has the unit."""
    tensors: int
    """The number of tensors of the unit, in A and B together."""
    not_compared: str | None
    """The reason why the values weren't compared: ``"absent"`` (a file is missing here) or ``"no_torch"``."""
    changes: tuple[TensorChange, ...]

    @property
    def differs(self) -> bool:
        """Return whether a tensor differs. Values that couldn't be compared count as different, as the digests are."""
        return bool(self.changes) or self.not_compared is not None


@record(frozen=True, slots=True, kw_only=True)
class Weights:
    """The stored dtypes, and the units whose files differ."""

    a: Storage
    b: Storage
    units: tuple[UnitChange, ...]

    @property
    def differs(self) -> bool:
        """Return whether a stored dtype or a tensor differs. The same values in other files are no difference."""
        return self.a != self.b or any(unit.differs for unit in self.units)


@record(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """The fields of ``text`` in the manifest, ``text.json``, and the files under ``tokenizer/``, that differ."""

    changes: tuple[FieldChange, ...]
    files: tuple[FileChange, ...]
    texts: tuple[FieldChange, ...] = ()
    """What differs in ``text.json``. ``pointer`` has a name in place of a number: ``/templates/NAME``,
    ``/variables/NAME``, ``/defaults/FIELD``, ``/cases/TEXT``, ``/chats/TEXT``. Of two templates, the first lines that
    differ are given. Empty too if one of these files isn't here."""

    @property
    def differs(self) -> bool:
        """Return whether a field or a file differs."""
        return bool(self.changes or self.files)


@record(frozen=True, slots=True, kw_only=True)
class GoldenVectors:
    """The golden vectors of a bundle."""

    lengths: tuple[int, ...]
    origin: str
    """``"original"`` or ``"self"``."""
    sha256: str


@record(frozen=True, slots=True, kw_only=True)
class VectorsOfBoth:
    """The golden vectors of each bundle; None for a bundle without some."""

    a: GoldenVectors | None
    b: GoldenVectors | None

    @property
    def differs(self) -> bool:
        """Return whether they differ."""
        return self.a != self.b


@record(frozen=True, slots=True, kw_only=True)
class Files:
    """The listed files that differ, and the listed files that are missing here.

    A file that is missing here makes a bundle partial. It is no difference.
    """

    changes: tuple[FileChange, ...]
    absent_in_a: tuple[str, ...]
    absent_in_b: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Return whether the manifests list other files, or other digests."""
        return bool(self.changes)


@record(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The differences of two bundles. An aspect that wasn't asked for is None."""

    a: Identity
    b: Identity
    relation: str
    """``"same_bundle"``, ``"same_model"`` (one fingerprint), ``"b_changed_from_a"``, ``"a_changed_from_b"``,
    ``"changed_from_one"`` (both are changed copies of one bundle), ``"same_architecture"`` or ``"other_model"``."""
    model: Fields | None
    """The fields of the manifest that describe the model: its name and origin, the producer, extensions."""
    cuts: Cuts | None
    facts: Fields | None
    """The fields of architecture.json."""
    weights: Weights | None
    tokenizer: Tokenizer | None
    vectors: VectorsOfBoth | None
    files: Files | None

    @property
    def compared(self) -> dict[str, Any]:
        """Return the aspects that were asked for: name -> record. Each record has ``differs``."""
        return {name: value for name in ASPECTS if (value := getattr(self, name)) is not None}

    @property
    def differs(self) -> bool:
        """Return whether anything that was asked for differs.

        If all aspects were asked for, bundles with different ids always differ: their manifests are at least written
        differently.
        """
        if len(self.compared) == len(ASPECTS) and self.a.bundle_id != self.b.bundle_id:
            return True
        return any(aspect.differs for aspect in self.compared.values())

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as JSON has it. An aspect that wasn't asked for is null."""
        aspects = {name: {"differs": value.differs, **as_dict(value)} for name, value in self.compared.items()}
        return {
            "differs": self.differs,
            "relation": self.relation,
            "a": as_dict(self.a),
            "b": as_dict(self.b),
            **{name: aspects.get(name) for name in ASPECTS},
        }
