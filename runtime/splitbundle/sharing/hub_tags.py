"""Tags of repositories of the Hugging Face Hub."""

from __future__ import annotations

from splitbundle.sharing.hub import HubPlace
from splitbundle.sharing.network import Patience
from splitbundle.sharing.reference import Reference


def add(reference: Reference, tag: str, patience: Patience) -> str:
    """Give the commit that a reference names a further tag, and return the commit."""
    place = HubPlace(reference, patience)
    commit = place.look()
    with place.failures():
        place.api.create_tag(reference.path, tag=tag, revision=commit)
    return commit


def remove(reference: Reference, patience: Patience) -> None:
    """Remove a tag."""
    place = HubPlace(reference, patience)
    with place.failures():
        place.api.delete_tag(reference.path, tag=str(reference.revision))


def every(reference: Reference, patience: Patience) -> list[tuple[str, str]]:
    """Return the tags and the branches, with their commits."""
    place = HubPlace(reference, patience)
    with place.failures():
        found = place.api.list_repo_refs(reference.path)
    return [(each.name, each.target_commit) for each in (*found.branches, *found.tags)]
