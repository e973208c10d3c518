"""Log to ``logging.getLogger("splitbundle")``, and never import ``logging``.

Importing ``logging`` would take longer than opening a bundle. An application that wants messages imports it, to say
where they go. So, where nothing has imported it, a message goes nowhere, and costs one look-up.

Messages hold paths, ids and numbers. They never hold a prompt, or a text that a model made.
"""

from __future__ import annotations

import sys

NAME = "splitbundle"


def debug(message: str, *values: object) -> None:
    """Log a message of the level DEBUG. ``%s`` and the like in it stand for the values.

    The first message gives the logger a handler that does nothing, as libraries do it. So Python writes no message by
    itself, and the application's handlers get them all.
    """
    logging = sys.modules.get("logging")
    if logging is None or not hasattr(logging, "NullHandler"):  # without the latter, another thread is importing it
        return
    logger = logging.getLogger(NAME)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.debug(message, *values, stacklevel=2)
