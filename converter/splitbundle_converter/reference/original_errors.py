"""Turn the errors of the original class into refusals that name the field of the configuration that causes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from splitbundle.errors import BundleError, quoted
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.errors import line, refusal
from splitbundle_converter.families.configuration import parse
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.quiet_transformers import quiet

UNCHECKED: Final = "check=False converts without the original model, and without golden vectors"
BY_LAYER: Final = 'check="layers" compares one layer at a time, and needs memory for that layer alone'
Model = TypeVar("Model")
_NO_MEMORY: Final = "DefaultCPUAllocator"
"""A word in the message of torch's error for an allocation that fails. torch raises a plain RuntimeError for it."""


def loaded(load: Callable[..., Model]) -> Model:
    """Return the result of ``load``, which loads or builds the original model.

    A field that changes no logits can still keep the class from being built: a padding token that is not in the
    vocabulary, for instance. So after an error, the model is loaded once more without these fields.
    """
    try:
        return load()
    except (BundleError, MemoryError):
        raise
    except Exception:  # noqa: BLE001  # a class may raise any error for a value that does not suit it
        return load(inert=False)


@contextmanager
def explained(found: Configuration, memory_hint: str = BY_LAYER) -> Iterator[None]:
    """Raise the errors of the original class in the block as refusals.

    ``memory_hint`` is the next step if there isn't enough memory.

    Raises:
        BundleError: ``source.config`` with the field that causes the error, if trying finds one; ``memory``.
    """
    try:
        yield
    except BundleError:
        raise
    except MemoryError as error:
        raise _no_memory(error, memory_hint) from error
    except Exception as error:  # a class may raise any error for a value that does not suit it
        if _NO_MEMORY in str(error):
            raise _no_memory(error, memory_hint) from error
        model_type = found.raw.get("model_type")
        name = _culprit(found.raw) if model_type in FAMILIES else None
        expected = f"a configuration with which transformers' {model_type} builds and runs"
        if name is None:
            raise refusal(
                "source.config", found.file, expected, line(error), UNCHECKED, found.pointer or None
            ) from error
        got = f"{quoted(found.raw[name])}, with which it raises {line(error)}"
        hint = "Compare the field with the published configuration of the model"
        raise refusal("source.config", found.file, expected, got, hint, f"{found.pointer}/{name}") from error


def _no_memory(error: BaseException, hint: str) -> BundleError:
    return refusal("memory", None, "enough memory to check against the original model", line(error), hint)


def fill_with_nothing(model: Any) -> None:
    """Replace each tensor on the meta device with one NaN that is expanded to the shape, which takes no memory.

    Some classes look at the device or at the values of a weight, which a tensor on the meta device doesn't have.
    """
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: nothing(tensor) for name, tensor in tensors.items() if tensor is not None})


def nothing(tensor: Tensor) -> Tensor:
    """Return what ``fill_with_nothing`` puts in place of a tensor on the meta device, or another tensor itself."""
    if not tensor.is_meta:
        return tensor
    value = torch.nan if tensor.is_floating_point() else 0
    filled = torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)
    return torch.nn.Parameter(filled, False) if isinstance(tensor, torch.nn.Parameter) else filled


def _culprit(raw: dict[str, Any]) -> str | None:
    """Return the field without which a model of the configuration can be built and run, or None."""
    for attempt in (_build, _run):
        if attempt(raw):
            continue
        fields = [name for name in raw if name != "model_type"]
        return next((name for name in fields if attempt({other: raw[other] for other in raw if other != name})), None)
    return None  # without the weights, the error does not show


def _build(raw: dict[str, Any]) -> Any:
    """Return the original model of the configuration without memory for its weights, or None after an error."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config, error = parse(raw)
    if error is not None:
        return None
    config._attn_implementation = config._experts_implementation = "eager"
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # the mapping has a class for each family
    try:
        with quiet(), torch.device("meta"):
            return original(config).eval()
    except Exception:  # noqa: BLE001  # any error means that it can't be built
        return None


def _run(raw: dict[str, Any]) -> bool:
    """Return whether the original model of the configuration computes two tokens."""
    model = _build(raw)
    if model is None:
        return False
    fill_with_nothing(model)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False, return_dict=True)
    except Exception:  # noqa: BLE001  # any error means that it does not run
        return False
    return True
