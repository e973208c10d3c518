"""Compare two JSON values field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from splitbundle.comparison.records import FieldChange
from splitbundle.format.fields import escape


def field_changes(a: Any, b: Any, pointer: str = "") -> Iterator[FieldChange]:
    """Yield the fields of two JSON values that differ. Objects are entered; arrays are compared as one value."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        # As text, because Python takes 1, 1.0 and true for equal.
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            yield FieldChange(pointer=pointer, a=a, b=b, only_in=None)
        return
    for key in {**a, **b}:
        where = f"{pointer}/{escape(key)}"
        if key in a and key in b:
            yield from field_changes(a[key], b[key], where)
        else:
            yield FieldChange(pointer=where, a=a.get(key), b=b.get(key), only_in="a" if key in a else "b")
