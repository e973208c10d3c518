"""Which transport a reference needs."""

from __future__ import annotations

from splitbundle.sharing.cache import refuse_offline
from splitbundle.sharing.network import Patience
from splitbundle.sharing.reference import PLAIN_HTTP, Reference, may_be_plain, wrong_reference
from splitbundle.sharing.transport import Destination, Source


def open_source(reference: Reference, patience: Patience) -> Source:
    """Return the source that a reference names. Nothing is asked yet.

    Raises:
        MissingExtra: a library for this kind of reference isn't installed.
        BundleError: ``usage.reference``.
    """
    # Imported here, as each transport loads its own libraries.
    if reference.scheme in ("http", "https"):
        if reference.scheme == "http" and not may_be_plain(reference.host):
            hint = f"If you trust the network up to there: --plain-http, or {PLAIN_HTTP}={reference.host}"
            raise wrong_reference(str(reference), "https://, or a host that may be asked without TLS", "http://", hint)
        if reference.path.endswith(".tar"):
            hint = "Download the file, and run: splitbundle unpack FILE.tar -o NAME.splitbundle"
            raise wrong_reference(str(reference), "the URL of a bundle's directory", "that of an archive", hint)
        from splitbundle.sharing.static_server import StaticServer

        return StaticServer(reference, patience)
    if reference.scheme == "oci":
        from splitbundle.sharing.oci_bundle import OciSource

        return OciSource(reference, patience)
    if reference.scheme == "hf":
        from splitbundle.sharing.hub import HubSource

        return HubSource(reference, patience)
    if reference.scheme:
        from splitbundle.sharing.filesystems import FileSystemSource

        return FileSystemSource(reference, patience)
    from splitbundle.sharing.local import LocalSource

    return LocalSource(reference)


def open_destination(reference: Reference, patience: Patience) -> Destination:
    """Return the destination that a reference names. Nothing is asked yet.

    Raises:
        MissingExtra: as for ``open_source``.
        BundleError: ``usage.reference`` for a place that can't be pushed to.
    """
    refuse_offline(str(reference))
    if reference.pin is not None:
        raise wrong_reference(str(reference), "a reference without @sha256:", "one with a pin")
    if reference.scheme == "oci":
        from splitbundle.sharing.oci_bundle import OciDestination

        return OciDestination(reference, patience)
    if reference.scheme == "hf":
        from splitbundle.sharing.hub import HubDestination

        return HubDestination(reference, patience)
    if reference.scheme in ("http", "https"):
        hint = "Copy the directory to where the server reads its files, or push to oci://, hf:// or s3://"
        raise wrong_reference(str(reference), "a place that takes files", "a static server", hint)
    if not reference.scheme:
        hint = "splitbundle pull BUNDLE -o DIR copies a bundle on this machine"
        raise wrong_reference(str(reference), "a reference to another machine", "a path", hint)
    from splitbundle.sharing.filesystems import FileSystemDestination

    return FileSystemDestination(reference, patience)
