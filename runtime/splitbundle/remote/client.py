"""The names of this folder that the backends' loader needs. Importing it imports gRPC."""

from __future__ import annotations

from splitbundle.remote.carrier import Lost
from splitbundle.remote.measuring import Measured, measure
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.peers import Expected, Peers, check_identity

__all__ = ["Expected", "Lost", "Measured", "Peers", "RemoteOptions", "check_identity", "measure"]
