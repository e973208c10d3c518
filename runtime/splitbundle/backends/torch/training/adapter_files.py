"""The two files of a directory with adapters, as PEFT writes and reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from splitbundle.backends.torch.training.safetensors_file import read_safetensors
from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json, weight_layout
from splitbundle.records import record
from splitbundle.storage import files
from splitbundle.writing.atomic_directory import atomic_directory

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
_KNOWN: Final = frozenset(
    {"alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out"}
    | {"inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"}
    | {"megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"}
    | {"revision", "target_modules", "task_type", "use_rslora"}
)
"""Fields of a configuration that are read here, or that change nothing in a trained adapter. Every other field must be
empty: some change the model in ways that a stage doesn't know."""
_PLAIN_STARTS: Final = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to start an adapter that leave the layer as it is. The others change the layer's own weight, too."""
BASE: Final = ".base_layer.weight"
"""The end of a name under which PEFT stores the layer itself beside its adapter, as it does for a head."""


@record(frozen=True, slots=True, kw_only=True)
class SourceAdapter:
    """The adapter of one layer of the source model."""

    a: Tensor
    """*Shape:* (rank, inputs)."""
    b: Tensor
    """*Shape:* (outputs, rank)."""
    alpha: float

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.a.shape[0]


def write_adapters(path: Path, config: dict[str, Any], tensors: Mapping[str, Tensor], *, force: bool) -> Path:
    with atomic_directory(path, force=force, ours=_is_adapter) as root:
        stored = {
            name: weight_layout.Tensor(dtype=str(own.dtype).removeprefix("torch."), shape=tuple(own.shape))
            for name, own in tensors.items()
        }
        write_weights(root / WEIGHTS, stored, tensors.__getitem__)
        (root / CONFIG).write_bytes(strict_json.dump(config))
    return path


def _is_adapter(path: Path) -> bool:
    return not path.is_symlink() and path.is_dir() and {entry.name for entry in path.iterdir()} <= {CONFIG, WEIGHTS}


def read_adapters(path: Path) -> tuple[dict[str, Any], dict[str, SourceAdapter], dict[str, Tensor]]:
    """Return the configuration of a directory, its adapters by the names of the source's layers, and stored layers."""
    if not (path / CONFIG).is_file():
        expected, got = f"a directory with {CONFIG} and {WEIGHTS}", "one without" if path.is_dir() else "no directory"
        raise BundleError(Problem(code="file.missing", file=str(path), expected=expected, got=got))
    raw = strict_json.parse(files.read_file(path, CONFIG, strict_json.MAX_BYTES), CONFIG)
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        got = quoted(raw.get("peft_type") if isinstance(raw, dict) else raw)
        raise _config_problem("peft_type", '"LORA"', got)
    for name, value in raw.items():
        if name not in _KNOWN and value not in (None, False, "none", [], {}):
            raise _config_problem(name, "nothing: a stage has plain LoRA", quoted(value))
    start = raw.get("init_lora_weights")
    if not any(start is plain for plain in _PLAIN_STARTS[:3]) and start not in _PLAIN_STARTS[3:]:
        hint = "PEFT can save it as plain LoRA: path_initial_model_for_weight_conversion"
        raise _config_problem("init_lora_weights", "a start that leaves the layer as it is", quoted(start), hint)
    dropout, rslora = raw.get("lora_dropout") or 0.0, raw.get("use_rslora") or False
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise _config_problem("lora_dropout", "a number from 0 to below 1", quoted(dropout))
    if not isinstance(rslora, bool):
        raise _config_problem("use_rslora", "true or false", quoted(rslora))
    found: dict[str, dict[str, Tensor]] = {}
    bases: dict[str, Tensor] = {}
    for key, tensor in read_safetensors(path, WEIGHTS).items():
        if key.startswith(PREFIX) and key.endswith(BASE):
            bases[key.removeprefix(PREFIX).removesuffix(BASE)] = tensor
            continue
        name, _, end = key.removeprefix(PREFIX).rpartition(".lora_")
        matrix = tensor.ndim == 2 and tensor.is_floating_point()
        if not key.startswith(PREFIX) or end not in ("A.weight", "B.weight") or not matrix:
            expected = f"{PREFIX}LAYER.lora_A.weight or …lora_B.weight, a matrix"
            got = f"{key!a}, {tensor.dtype} {list(tensor.shape)}"
            raise BundleError(Problem(code="adapter.tensor", file=WEIGHTS, expected=expected, got=got))
        found.setdefault(name, {})[end[0]] = tensor
    alpha = _alpha_of(raw)
    adapters = {}
    for name, pair in found.items():
        if len(pair) < 2:
            raise BundleError(
                Problem(code="adapter.tensor", file=WEIGHTS, argument=name, expected="A and B", got="one of them")
            )
        adapters[name] = SourceAdapter(a=pair["A"], b=pair["B"], alpha=alpha(name))
    return raw, adapters, bases


def _alpha_of(config: Mapping[str, Any]) -> Callable[[str], float]:
    """Return a function that gives alpha for a layer.

    PEFT takes the keys of ``alpha_pattern`` as regular expressions. Here they must be names or ends of names: a pattern
    from a stranger could take for ever.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _config_problem("alpha_pattern", "an object", quoted(patterns))
    named: list[tuple[bool, str, float]] = []
    for key, value in patterns.items():
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", plain):
            raise _config_problem("alpha_pattern", "names of layers, or ends of names", quoted(key))
        named.append((key.startswith("^"), plain, _alpha(value)))
    default = _alpha(config.get("lora_alpha", 8))

    def alpha(name: str) -> float:
        for whole, plain, value in named:
            if name == plain or (not whole and name.endswith(f".{plain}")):
                return value
        return default

    return alpha


def _alpha(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _config_problem("lora_alpha", "a number above 0", quoted(value))
    return float(value)


def _config_problem(field: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(
        Problem(code="adapter.config", file=CONFIG, pointer=f"/{field}", expected=expected, got=got, hint=hint)
    )
