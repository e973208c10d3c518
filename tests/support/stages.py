"""The messages of refused calls."""

from __future__ import annotations

from typing import Any

import pytest

from splitbundle import BundleError


def refusal(call: Any, *arguments: Any, **named: Any) -> str:
    """Return the text of the error that a call ends with."""
    with pytest.raises(BundleError) as caught:
        call(*arguments, **named)
    return str(caught.value)
