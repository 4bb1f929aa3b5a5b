"""The two life cycles of this package: of a conversation, and of a server."""

from enum import Enum, auto


class End(Enum):
    """The state of a conversation: open, or why it is over.

    ======== ================================== ================== =============================
    state    comes from                         ``receive`` raises ``send``
    ======== ================================== ================== =============================
    OPEN     the beginning                      nothing            works
    IDLE     OPEN, silent for ``idle_timeout``  EndOfChannel       works until the handler ends
    EVICTED  OPEN, its place was needed         EndOfChannel       works until the handler ends
    STOPPING OPEN, drained and inbox empty      EndOfChannel       works until the handler ends
    CLOSED   any, by ``close`` or handler's end ClosedResourceError raises ClosedResourceError
    LOST     any, endpoint or server is gone    ClosedResourceError raises ClosedResourceError
    ======== ================================== ================== =============================
    """

    OPEN = auto()
    IDLE = auto()
    EVICTED = auto()
    STOPPING = auto()
    CLOSED = auto()
    LOST = auto()


class Phase(Enum):
    """The phase of a server. It only moves down this list.

    ``CATCHING_UP`` begins with ``Server.stop()``: the loops read what the machine had received by then, and strangers
    still become clients. ``DRAINING`` begins when all of them have caught up: strangers are refused, and channels end.
    """

    RUNNING = auto()
    CATCHING_UP = auto()
    DRAINING = auto()
    ENDED = auto()


# Also as globals: a lookup in the class takes 50 ns before Python 3.12.
OPEN, IDLE, EVICTED, STOPPING, CLOSED, LOST = End
RUNNING, CATCHING_UP, DRAINING, ENDED = Phase
