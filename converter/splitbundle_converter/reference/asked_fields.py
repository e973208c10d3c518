"""Record which absent fields of a configuration the original class asks for while it is built and run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_lock = threading.Lock()
_recording: dict[int, set[str]] = {}
"""The id of a thread that records -> the names that the code in this thread asked for."""


@contextmanager
def asked_fields() -> Iterator[set[str]]:
    """Yield a set. In the block, it gets the name of each absent field that code in this thread asks for.

    The fields that the static reading of transformers did not find are absent from the configuration. A field with a
    computed name, in ``getattr(config, name)``, shows here.
    """
    from transformers import PreTrainedConfig

    config_class: Any = PreTrainedConfig
    names: set[str] = set()
    thread = threading.get_ident()
    with _lock:
        outer = _recording.get(thread)
        if not _recording:
            config_class.__getattr__ = _record  # Python calls it only for an attribute that is absent
        _recording[thread] = names
    try:
        yield names
    finally:
        with _lock:
            if outer is None:
                del _recording[thread]
            else:
                _recording[thread] = outer | names
            if not _recording:
                del config_class.__getattr__


def _record(config: object, name: str) -> NoReturn:
    names = _recording.get(threading.get_ident())
    if names is not None:
        names.add(name)
    raise AttributeError(f"{type(config).__name__!r} object has no attribute {name!r}")
