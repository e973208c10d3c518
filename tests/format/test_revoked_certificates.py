"""The document ``revoked.json``: its schema and its parser judge alike."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

import splitbundle_schemas
from splitbundle import BundleError
from splitbundle.format.revoked_certificates import MAX_BYTES, MAX_CERTIFICATES, make_revoked, parse_revoked

ONE, OTHER = "0" * 64, "ab" * 32
SCHEMA = jsonschema.Draft202012Validator(splitbundle_schemas.load("revoked-certificates"))


@pytest.mark.parametrize("fingerprints", [(), (ONE,), (OTHER, ONE)])
def test_a_list_is_read_as_it_is_written(fingerprints: tuple[str, ...]) -> None:
    data = make_revoked(fingerprints)
    SCHEMA.validate(json.loads(data))
    assert parse_revoked(data, "revoked.json") == fingerprints


@pytest.mark.parametrize(
    ("document", "pointer"),
    [
        ([], ""),
        ({}, ""),
        ({"version": 1}, ""),
        ({"certificates": []}, ""),
        ({"version": 2, "certificates": []}, "/version"),
        ({"version": "1", "certificates": []}, "/version"),
        ({"version": True, "certificates": []}, "/version"),
        ({"version": 1, "certificates": [], "more": 1}, "/more"),
        ({"version": 1, "certificates": None}, "/certificates"),
        ({"version": 1, "certificates": {ONE: 1}}, "/certificates"),
        ({"version": 1, "certificates": [ONE, 1]}, "/certificates/1"),
        ({"version": 1, "certificates": [ONE[1:]]}, "/certificates/0"),
        ({"version": 1, "certificates": [OTHER.upper()]}, "/certificates/0"),
        ({"version": 1, "certificates": [ONE + "\n"]}, "/certificates/0"),
        ({"version": 1, "certificates": [ONE, OTHER, ONE]}, "/certificates/2"),
        ({"version": 1, "certificates": [f"{i:064x}" for i in range(MAX_CERTIFICATES + 1)]}, "/certificates"),
    ],
)
def test_what_is_refused(document: Any, pointer: str) -> None:
    assert not SCHEMA.is_valid(document)
    with pytest.raises(BundleError) as caught:
        parse_revoked(json.dumps(document).encode(), "revoked.json")
    assert pointer in {problem.pointer for problem in caught.value.problems}
    assert {problem.file for problem in caught.value.problems} == {"revoked.json"}


def test_the_longest_list() -> None:
    data = make_revoked([f"{i:064x}" for i in range(MAX_CERTIFICATES)])
    assert len(data) < MAX_BYTES
    assert len(parse_revoked(data, "revoked.json")) == MAX_CERTIFICATES


def test_json_is_strict() -> None:
    text = b'{"version": 1, "certificates": ["%s"], "certificates": []}' % ONE.encode()
    with pytest.raises(BundleError, match="duplicate-key"):
        parse_revoked(text, "revoked.json")
    with pytest.raises(BundleError, match=r"\[json\.size\]"):
        parse_revoked(make_revoked(()) + b" " * MAX_BYTES, "revoked.json")
