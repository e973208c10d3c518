"""Run transformers without its progress bars and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers in the block. The converter reports problems itself."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions are untyped
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
