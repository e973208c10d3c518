"""The messages of the wire: a record for each kind. ``spec/v1/wire.md`` explains every field."""

from __future__ import annotations

from splitbundle.records import record

PROTOCOL = 1
"""The version of ``spec/v1/wire.md``."""


@record(frozen=True, slots=True, kw_only=True)
class Boundary:
    """A hidden state at a boundary, with the positions of its tokens."""

    op = "boundary"
    past: tuple[int, ...]
    count: tuple[int, ...]
    sequence: int
    width: int
    encoding: str


@record(frozen=True, slots=True, kw_only=True)
class Hello:
    """What the client is."""

    op = "hello"
    protocol: int
    fingerprint: str | None
    layers: tuple[int, int] | None


@record(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a server can take."""

    message: int
    rows: int
    capacity: int
    slots: int
    sessions: int
    tickets: int
    lease: float


@record(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What the server is."""

    op = "welcome"
    protocol: int
    fingerprint: str
    bundle: str
    layers: tuple[int, int]
    width: int
    dtype: str
    encodings: tuple[str, ...]
    backend: str
    version: str
    instance: str
    trainable: bool
    number: int
    limits: Limits


@record(frozen=True, slots=True, kw_only=True)
class Open:
    """Begin a session."""

    op = "open"
    rows: int
    capacity: int


@record(frozen=True, slots=True, kw_only=True)
class Opened:
    """A session has begun."""

    op = "opened"
    session: str
    instance: str
    lease: float


@record(frozen=False, slots=True, kw_only=True)
class Run:
    """Compute the stage for some tokens."""

    op = "run"
    session: str | None
    number: int
    past: tuple[int, ...]
    count: tuple[int, ...]
    sequence: int
    width: int
    encoding: str
    rows: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    capacity: int | None = None
    may_be_absent = ("rows", "order", "capacity")

    def __init__(
        self,
        *,
        session: str | None,
        number: int,
        past: tuple[int, ...],
        count: tuple[int, ...],
        sequence: int,
        width: int,
        encoding: str,
        rows: tuple[int, ...] | None = None,
        order: tuple[int, ...] | None = None,
        capacity: int | None = None,
    ) -> None:
        self.session, self.number, self.past, self.count = session, number, past, count
        self.sequence, self.width, self.encoding = sequence, width, encoding
        self.rows, self.order, self.capacity = rows, order, capacity


@record(frozen=False, slots=True, kw_only=True)
class Ran:
    """The result of a step."""

    op = "ran"
    number: int
    instance: str
    tokens: int
    width: int
    encoding: str
    queued: int
    computed: int

    def __init__(
        self, *, number: int, instance: str, tokens: int, width: int, encoding: str, queued: int, computed: int
    ) -> None:
        self.number, self.instance, self.tokens, self.width = number, instance, tokens, width
        self.encoding, self.queued, self.computed = encoding, queued, computed


@record(frozen=True, slots=True, kw_only=True)
class Renew:
    """Keep a session."""

    op = "renew"
    session: str


@record(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The session lives on."""

    op = "renewed"
    lease: float


@record(frozen=True, slots=True, kw_only=True)
class Close:
    """End a session."""

    op = "close"
    session: str


@record(frozen=True, slots=True, kw_only=True)
class Closed:
    """The session has ended."""

    op = "closed"


@record(frozen=True, slots=True, kw_only=True)
class Health:
    """Compute a step of the server's own."""

    op = "health"


@record(frozen=True, slots=True, kw_only=True)
class Healthy:
    """The step was computed."""

    op = "healthy"
    computed: int


@record(frozen=True, slots=True, kw_only=True)
class Train:
    """Begin to train."""

    op = "train"


@record(frozen=True, slots=True, kw_only=True)
class Training:
    """A run has begun."""

    op = "training"
    run: str
    number: int
    lease: float


@record(frozen=True, slots=True, kw_only=True)
class Forward:
    """Compute with gradients."""

    op = "forward"
    run: str
    ticket: int
    count: tuple[int, ...]
    sequence: int
    width: int
    encoding: str


@record(frozen=True, slots=True, kw_only=True)
class Forwarded:
    """The result of a forward call."""

    op = "forwarded"
    ticket: int
    tokens: int
    width: int
    encoding: str


@record(frozen=True, slots=True, kw_only=True)
class Backward:
    """Take a gradient back."""

    op = "backward"
    run: str
    ticket: int
    tokens: int
    width: int
    encoding: str


@record(frozen=True, slots=True, kw_only=True)
class Backwarded:
    """The gradient for the part before."""

    op = "backwarded"
    ticket: int
    tokens: int
    width: int
    encoding: str


@record(frozen=True, slots=True, kw_only=True)
class Discard:
    """Drop the gradients of the present step."""

    op = "discard"
    run: str


@record(frozen=True, slots=True, kw_only=True)
class Discarded:
    """The gradients are dropped."""

    op = "discarded"
    number: int


@record(frozen=True, slots=True, kw_only=True)
class Step:
    """Move the weights."""

    op = "step"
    run: str
    number: int
    learning_rate: float | None = None
    may_be_absent = ("learning_rate",)


@record(frozen=True, slots=True, kw_only=True)
class Stepped:
    """The weights have moved."""

    op = "stepped"
    number: int


@record(frozen=True, slots=True, kw_only=True)
class Failure:
    """A refusal, or a failure."""

    op = "error"
    code: str
    expected: str
    got: str
    argument: str | None
    retry: str


Request = Hello | Open | Run | Renew | Close | Health | Train | Forward | Backward | Discard | Step
Answer = (
    Welcome
    | Opened
    | Ran
    | Renewed
    | Closed
    | Healthy
    | Training
    | Forwarded
    | Backwarded
    | Discarded
    | Stepped
    | Failure
)
Message = Boundary | Request | Answer
KINDS: dict[str, type[Message]] = {
    kind.op: kind
    for kind in (
        *(Boundary, Hello, Welcome, Open, Opened, Run, Ran, Renew, Renewed, Close, Closed, Health, Healthy),
        *(Train, Training, Forward, Forwarded, Backward, Backwarded, Discard, Discarded, Step, Stepped, Failure),
    )
}
"""``op`` -> the record."""
ANSWERS: dict[type[Message], type[Message]] = {
    Hello: Welcome,
    Open: Opened,
    Run: Ran,
    Renew: Renewed,
    Close: Closed,
    Health: Healthy,
    Train: Training,
    Forward: Forwarded,
    Backward: Backwarded,
    Discard: Discarded,
    Step: Stepped,
}
"""The kind of a request -> the kind of its answer, unless it is an error."""
