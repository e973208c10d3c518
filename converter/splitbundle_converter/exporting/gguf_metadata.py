"""What a GGUF file says of a model: the metadata and the tensor names of llama.cpp, made of a bundle's facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, quoted
from splitbundle.format.architecture.decoder import FILE, Architecture
from splitbundle.format.architecture.feedforward import Mlp
from splitbundle.format.architecture.rotary import Llama3, Rotary, Unscaled
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle.format.manifest.document import EMBEDDING, expand
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.errors import refusal
from splitbundle_converter.families.configuration import read_configuration
from splitbundle_converter.gguf_files.metadata import ARCHITECTURES, configuration

_HEAD: Final = "head.projection.weight"
_CONTEXT: Final = 2048
"""The context length of a model that states none. llama.cpp needs a number."""
_HINT: Final = "Export the model with to='hf', and convert it with the scripts of llama.cpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """How llama.cpp names a model."""

    kind: str
    """The architecture: ``llama``, ``qwen2`` or ``qwen3``."""
    fields: Mapping[str, int | float]
    """The metadata by name, without the tokenizer."""
    names: Mapping[str, str]
    """The names of the file's tensors by logical name."""
    rotary: Rotary | None
    """The rotary positions if they are scaled. The file has their factors then."""

    def heads(self, name: str, architecture: Architecture) -> int | None:
        """Return the number of heads whose rows have another order in the file, or None for other tensors.

        llama.cpp's ``llama`` rotates neighboring channels, and the bundle the halves of a head.
        """
        part = name.split(".")[-2]
        if self.kind != "llama" or part not in ("query", "key"):
            return None
        attention = architecture.kind_of(0).attention
        return attention.heads if part == "query" else attention.kv_heads


def described(bundle: Bundle) -> GgufModel:
    """Return how llama.cpp names a bundle's model.

    The metadata is read back, as ``convert`` reads a file. Only a model whose facts come back equal has a name.

    Raises:
        BundleError: ``source.family`` if no architecture of llama.cpp has the facts of the model.
    """
    architecture = bundle.architecture
    plain, scaled = _unscaled(architecture)
    nearest: list[str] | None = None
    for kind in ARCHITECTURES:
        fields = _fields(kind, bundle)
        if fields is None:
            continue
        try:
            judged = read_configuration(Configuration(raw=configuration(fields, _shapes(plain), FILE), file=FILE))
        except BundleError:
            continue
        other = list(_differences(plain.as_json(), judged.architecture.as_json()))
        if not other and (scaled is None or kind == "llama"):
            rows = [entry for row in judged.family.names(plain) for entry in expand(row, len(plain.layers))]
            names = {entry.tensors[0]: entry.source for entry in rows}
            return GgufModel(kind=kind, fields=fields, names=_named(kind, names, len(plain.layers)), rotary=scaled)
        if nearest is None or len(other) < len(nearest):
            nearest = other or ["/layer_kinds/*/attention/position/scaling"]
    expected = f"a model that llama.cpp's architectures {', '.join(ARCHITECTURES)} describe"
    got = f"other facts: {', '.join(nearest[:MAX_PROBLEMS])}" if nearest else quoted(bundle.manifest.model.family)
    raise refusal("source.family", FILE, expected, got, _HINT)


def _unscaled(architecture: Architecture) -> tuple[Architecture, Rotary | None]:
    """Return the facts without Llama 3's scaling of rotary positions, and the scaled positions if there are some.

    The scaling is in the file as factors (``rope_freqs.weight``), and not in the metadata.
    """
    positions = {kind.attention.position for kind in architecture.layer_kinds.values()}
    position = next(iter(positions)) if len(positions) == 1 else None
    if not isinstance(position, Rotary) or not isinstance(position.scaling, Llama3):
        return architecture, None
    kinds = {
        name: replace(kind, attention=replace(kind.attention, position=replace(position, scaling=Unscaled())))
        for name, kind in architecture.layer_kinds.items()
    }
    return replace(architecture, layer_kinds=kinds), position


def _fields(kind: str, bundle: Bundle) -> dict[str, Any] | None:
    """Return the metadata, or None if the first layer has facts that it has no words for."""
    architecture = bundle.architecture
    layer = architecture.kind_of(0)
    attention, position = layer.attention, layer.attention.position
    if not isinstance(layer.mlp, Mlp) or not isinstance(position, Rotary):
        return None
    own: dict[str, int | float] = {
        "vocab_size": architecture.vocab_size,
        "context_length": bundle.manifest.model.context_length or _CONTEXT,
        "embedding_length": architecture.hidden_size,
        "block_count": len(architecture.layers),
        "feed_forward_length": layer.mlp.intermediate_size,
        "rope.dimension_count": position.dim,
        "rope.freq_base": float(position.base),
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.value_size,
        "attention.layer_norm_rms_epsilon": float(layer.norm.eps),
    }
    return {"general.architecture": kind, **{f"{kind}.{name}": value for name, value in own.items()}}


def _shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of which ``configuration`` takes facts."""
    shapes = architecture.tensors()
    found = {"token_embd.weight": shapes[EMBEDDING]}
    if _HEAD in shapes:
        found["output.weight"] = shapes[_HEAD]
    if architecture.kind_of(0).attention.qkv_bias:
        found["blk.0.attn_q.bias"] = (architecture.hidden_size,)
    return found


def _named(kind: str, sources: Mapping[str, str], layers: int) -> dict[str, str]:
    import gguf

    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    table = gguf.get_tensor_name_map(number, layers)
    ends = (".weight", ".bias")
    return {name: own for name, source in sources.items() if (own := table.get_name(source, try_suffixes=ends))}


def _differences(one: object, other: object, pointer: str = "") -> Iterator[str]:
    """Yield the pointers of values that differ. Names of kinds of layers don't count, and a file has float32."""
    if isinstance(one, dict) and isinstance(other, dict):
        if pointer == "/layer_kinds" and len(one) == len(other) == 1:
            one, other = {"*": next(iter(one.values()))}, {"*": next(iter(other.values()))}
        for name in one | other:
            if pointer or name != "layers":
                yield from _differences(one.get(name), other.get(name), f"{pointer}/{name}")
    elif isinstance(one, float) and isinstance(other, float):
        if numpy.float32(one) != numpy.float32(other):
            yield pointer
    elif one != other:
        yield pointer
