"""Tags of bundles in registries and on the Hub."""

from __future__ import annotations

import re
from typing import Final

from splitbundle.errors import BundleError, quoted
from splitbundle.records import record
from splitbundle.sharing import model_pack
from splitbundle.sharing.cache import refuse_offline
from splitbundle.sharing.network import Patience, network_error
from splitbundle.sharing.reference import DEFAULT_TAG, Reference, wrong_reference
from splitbundle.sharing.registry import Registry

MAX_LOOKS: Final = 200
"""How many tags ``list_tags`` asks about. Of further ones it gives the names."""
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


@record(frozen=True, slots=True, kw_only=True)
class Tag:
    """A tag."""

    tag: str
    revision: str
    """The digest of the registry's manifest, or a commit of the Hub. Empty if it wasn't asked for."""
    bundle_id: str | None
    """The bundle id that the registry claims."""


def add_tag(reference: Reference, tag: str, patience: Patience) -> str:
    """Give what a reference names a further tag, and return its revision.

    Raises:
        BundleError: ``usage.reference``; ``network.*``.
    """
    refuse_offline(str(reference))
    if not _TAG.fullmatch(tag):
        raise wrong_reference(tag, "a tag of 1 to 128 of A-Z a-z 0-9 _ . -, not first . or -", quoted(tag))
    if reference.scheme == "hf":
        from splitbundle.sharing import hub_tags

        return hub_tags.add(reference, tag, patience)
    registry = _registry(reference, patience)
    name = reference.revision or (reference.pin if reference.pin is not None else DEFAULT_TAG)
    found = registry.manifest(name)
    if found is None:
        raise network_error("network.missing", str(reference), f"the tag {name}", "none of this name")
    data, digest = found
    if reference.pin is not None and reference.pin != digest:
        raise wrong_reference(str(reference), f"a pin of the registry's manifest, {digest}", str(reference.pin))
    return registry.put_manifest(tag, data)


def remove_tag(reference: Reference, patience: Patience) -> None:
    """Remove a tag. The bundle stays under its other tags.

    Raises:
        BundleError: ``usage.reference``; ``network.*``.
    """
    refuse_offline(str(reference))
    if reference.revision is None or reference.pin is not None:
        raise wrong_reference(str(reference), "a reference with a tag and without @sha256:", "one without a tag")
    if reference.scheme == "hf":
        from splitbundle.sharing import hub_tags

        hub_tags.remove(reference, patience)
        return
    if not _registry(reference, patience).remove_tag(reference.revision):
        raise network_error("network.missing", str(reference), f"the tag {reference.revision}", "none of this name")


def list_tags(reference: Reference, patience: Patience) -> list[Tag]:
    """Return the tags of a repository.

    Raises:
        BundleError: ``usage.reference``; ``network.*``.
    """
    refuse_offline(str(reference))
    if reference.revision is not None or reference.pin is not None:
        raise wrong_reference(str(reference), "a repository, without a tag or a pin", "one with it")
    if reference.scheme == "hf":
        from splitbundle.sharing import hub_tags

        return [Tag(tag=tag, revision=commit, bundle_id=None) for tag, commit in hub_tags.every(reference, patience)]
    registry = _registry(reference, patience)
    return [_look(registry, tag) if i < MAX_LOOKS else _unknown(tag) for i, tag in enumerate(registry.tags())]


def _look(registry: Registry, tag: str) -> Tag:
    found = registry.manifest(tag)
    if found is None:  # it was removed meanwhile
        return _unknown(tag)
    data, digest = found
    try:
        _, claimed = model_pack.parse_image_manifest(data, tag)
    except BundleError:  # another program's
        claimed = None
    return Tag(tag=tag, revision=digest, bundle_id=claimed)


def _unknown(tag: str) -> Tag:
    return Tag(tag=tag, revision="", bundle_id=None)


def _registry(reference: Reference, patience: Patience) -> Registry:
    if reference.scheme != "oci":
        got = f"{reference.scheme}://" if reference.scheme else "a path of this machine"
        raise wrong_reference(str(reference), "a reference to a registry or the Hub, which have tags", got)
    return Registry(reference, patience)
