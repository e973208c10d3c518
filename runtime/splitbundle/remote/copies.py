"""What a copy and a pickle of a remote stage are: a copy shares the connections, and nothing can be pickled."""

from __future__ import annotations

from typing import Any, NoReturn

from splitbundle.errors import BundleError, Problem


class Connected:
    """Connections to the servers of a stage. Threads may share them, and so may copies of the stage.

    What belongs to one user alone, the session of a cache, isn't here. So a copy of a stage computes like the stage.
    """

    named: str
    """The stage, for messages."""

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: object) -> Any:
        return self

    def __reduce__(self) -> NoReturn:
        # A pickle would hold a token or a private key, or a path to them that means nothing on another machine.
        hint = "Send the bundle, which is pickled as its path, and connect to the stage there"
        raise _refusal(self.named, "a stage that stays in its process", "a pickle of a remote stage", hint)


class Trained(Connected):
    """A connection over which the weights of a server are trained. The server has one set of them."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        hint = "Copy the stage without trainable=True, or start another server for the copy"
        expected = "a stage that only computes: a deep copy has weights of its own, and the server has one set"
        raise _refusal(self.named, expected, "a deep copy of a stage that is trained on a server", hint)


def _refusal(where: str, expected: str, got: str, hint: str) -> BundleError:
    return BundleError(Problem(code="stage.copy", argument=where, expected=expected, got=got, hint=hint))
