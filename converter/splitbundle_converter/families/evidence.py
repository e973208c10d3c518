"""Find out which fields of a configuration can change a result: those that transformers declares or reads.

The source files of transformers are read as text. No model class is imported, so this also serves a conversion that
never builds the original model.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from splitbundle_converter.errors import refusal

_SHARED: Final = (
    *("configuration_utils", "modeling_utils", "modeling_rope_utils"),
    *("masking_utils", "cache_utils", "pytorch_utils", "integrations.sdpa_attention"),
)
"""Modules of transformers that all models use."""
_CONFIGURING: Final = ("configuration_", "modeling_rope_utils")
"""Modules whose classes are configurations. There, ``self`` and ``kwargs`` hold fields."""
_HOLDERS: Final = frozenset(["self", "config", "kwargs"])
"""Names of objects that have fields, and are no fields."""
_ACCESS: Final = frozenset(["getattr", "hasattr", "setattr"])
_LOOKUP: Final = frozenset(["get", "pop", "setdefault"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What transformers does with the fields of a configuration class."""

    defaults: Mapping[str, Any]
    """A field that the class declares -> its default value."""
    aliases: frozenset[str]
    """Other names of declared fields."""
    readers: Mapping[str, str]
    """A field -> a source file of transformers whose code reads a field of this name."""
    mentioned: frozenset[str]
    """All strings in the code that reads the configuration, and so the names of the fields of inner objects."""

    def knows(self, name: str) -> bool:
        """Return whether transformers declares a field or reads it. Any other field changes no result."""
        return name in self.defaults or name in self.aliases or name in self.readers


@cache
def evidence(model_type: str, class_name: str | None = None) -> Evidence:
    """Return what transformers does with the fields of a model type.

    Args:
        model_type: The ``model_type`` of the configuration.
        class_name: The name of the model's class. By default it is the causal language model of the type.

    Raises:
        BundleError: ``source.config`` if this transformers is installed without its source files.
    """
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    configurations = [base.__module__ for base in config_class.__mro__ if ".models." in base.__module__]
    modules = [*configurations, _model_module(config_class, class_name), *(f"transformers.{name}" for name in _SHARED)]
    readers: dict[str, str] = {}
    for module in modules:
        for name in _of_module(module).read - _HOLDERS:
            if not callable(getattr(config_class, name, None)):  # a method is no field
                readers.setdefault(name, f"{module.rpartition('.')[2]}.py")
    return Evidence(
        defaults=MappingProxyType(config_class().to_dict()),
        aliases=frozenset(config_class.attribute_map),
        readers=MappingProxyType(readers),
        mentioned=frozenset().union(*(_of_module(module).mentioned for module in modules)),
    )


def _model_module(config_class: Any, class_name: str | None) -> str:
    """Return the module of the model's class. Its name follows from the configuration's, but for a few types."""
    beside = str(config_class.__module__).replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(beside) is not None:
        return beside
    import transformers

    found: Any = (
        getattr(transformers, class_name) if class_name else transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    )
    return str(found.__module__)


@dataclass(frozen=True, slots=True)
class _Names:
    read: frozenset[str]
    mentioned: frozenset[str]


@cache
def _of_module(module: str) -> _Names:
    """Return the names of the fields that the code of a module, and of the models that it imports, reads."""
    spec = importlib.util.find_spec(module)
    if spec is None:  # this version of transformers has no such module
        return _Names(frozenset(), frozenset())
    try:
        tree = ast.parse(Path(spec.origin or "").read_bytes())
    except (OSError, SyntaxError):
        expected, hint = f"the source file of {module}", "Install transformers with pip, which brings its source files"
        raise refusal("source.config", None, expected, "none that Python can read", hint) from None
    found = [_of_module(name) for name in _imported_models(tree, module)]
    read = frozenset(_names(tree, configures=module.rpartition(".")[2].startswith(_CONFIGURING)))
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return _Names(
        read.union(*(each.read for each in found)), frozenset(strings).union(*(each.mentioned for each in found))
    )


def _imported_models(tree: ast.AST, module: str) -> Iterator[str]:
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            name = importlib.util.resolve_name("." * node.level + node.module, package)
            if ".models." in name and ".modeling_" in name and ".models.auto." not in name:
                yield name


def _names(tree: ast.AST, *, configures: bool) -> Iterator[str]:
    """Yield the names in ``config.NAME``, ``getattr(config, "NAME")``, ``config["NAME"]`` and similar expressions."""
    holders = ("self", "kwargs") if configures else ()

    def is_config(node: ast.AST) -> bool:
        match node:
            case ast.Name(id=name):
                return "config" in name or name in holders
            case ast.Attribute(attr=name) | ast.Call(func=ast.Attribute(attr=name)):
                return "config" in name
        return False

    nodes = list(ast.walk(tree))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}  # a method is no field
    for node in nodes:
        match node:
            case ast.Attribute(value=value, attr=name) if is_config(value) and id(node) not in called:
                yield name
            case ast.Call(func=ast.Name(id=function), args=[value, ast.Constant(value=str(name)), *_]) if (
                function in _ACCESS and is_config(value)
            ):
                yield name
            case ast.Call(func=ast.Attribute(value=value, attr=function), args=[ast.Constant(value=str(name)), *_]) if (
                function in _LOOKUP and is_config(value)
            ):
                yield name
            case ast.Subscript(value=value, slice=ast.Constant(value=str(name))) if is_config(value):
                yield name
            case ast.FunctionDef(name="__init__" | "__post_init__", args=arguments) if configures:
                yield from (argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs))
            case ast.Compare(left=ast.Constant(value=str(name)), comparators=[value]) if is_config(value):
                yield name
