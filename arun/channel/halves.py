"""What a session keeps of each stream, and what it tells its shell. Decides nothing."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from msgspec import Raw, Struct

from arun.channel.codec import STRUCTURE_BYTES, exceeds_structure
from arun.channel.outbox import Run, item_prefix
from arun.errors import ChannelLost, ProtocolError

if TYPE_CHECKING:
    from arun.channel.messages import End, Fail, Open
    from arun.channel.outbox import Transfer

__all__ = ("Allowed", "Arrival", "Batch", "Effects", "Inbound", "Lost", "Outbound", "Started", "State")

State: TypeAlias = Literal["idle", "open", "cancelling", "closed"]


class Allowed(NamedTuple):
    """What the peer announced that it takes."""

    streams: int
    message_bytes: int


class Lost(NamedTuple):
    """Outcome of the streams that were open when the connection ended."""

    reason: str
    cause: BaseException | None = None

    def error(self) -> ChannelLost:
        """A fresh error for one waiter: one raised twice would collect both tracebacks."""
        error = ChannelLost(self.reason)
        error.__cause__ = self.cause
        return error


class Batch(Struct, frozen=True, gc=False):
    """Several items that came as one message: how many, their bytes, and the array of them."""

    count: int
    size: int
    payloads: Raw


class Arrival:
    """A large payload of which parts are there."""

    __slots__ = ("data", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.data = bytearray()

    def add(self, part: memoryview, what: str) -> bool:
        """Take the next part; tells whether it was the last.

        :raises ProtocolError: it is longer than what was announced, or empty; or the whole would become too large.
        """
        self.data += part
        if not part or len(self.data) > self.size:
            raise ProtocolError(f"{what} of {self.size} bytes in parts, and one of {len(part)} bytes does not fit")
        if len(self.data) < self.size:
            return False
        if self.size > STRUCTURE_BYTES and exceeds_structure((self.data,)):
            raise ProtocolError(f"{what} with more than {STRUCTURE_BYTES} bytes besides its strings, bytes and arrays")
        return True


class Inbound:
    """Opener's half of a stream: items that arrived and are not consumed yet.

    :ivar items: payloads in order, as they came: single ones and batches.
    :ivar outcome: how the stream ended, None while it goes on. Unread items come first.
    """

    __slots__ = (
        "arriving",
        "bytes_left",
        "bytes_used",
        "id",
        "items",
        "items_left",
        "items_used",
        "method",
        "outcome",
        "received",
        "state",
        "transfer",
        "window",
        "window_bytes",
    )

    def __init__(self, stream: int, method: str, window: int, window_bytes: int) -> None:
        self.id = stream
        self.method = method
        self.state: State = "open"
        self.items: deque[Raw | Batch] = deque()
        self.outcome: End | Fail | Lost | None = None
        # The request, while parts of it are to be sent, and the item of which parts are there.
        self.transfer: Transfer | None = None
        self.arriving: Arrival | None = None
        self.window, self.window_bytes = window, window_bytes
        # What the peer may still send, and what was consumed but not granted again.
        self.items_left, self.bytes_left = window, window_bytes
        self.items_used, self.bytes_used = 0, 0
        self.received = 0


class Outbound:
    """Handler's half of a stream: the credit that is left for sending.

    :ivar transfer: the item of which parts are still to be sent; what it is made of must stay as it is so long.
    :ivar traceparent: the opener's place in a trace, or nothing.
    """

    __slots__ = (
        "arriving",
        "batch",
        "bytes_left",
        "id",
        "items_left",
        "method",
        "prefix",
        "run",
        "state",
        "traceparent",
        "transfer",
        "window",
        "window_bytes",
    )

    def __init__(self, opened: Open) -> None:
        self.id = opened.stream
        self.method = opened.method
        self.state: State = "open"
        self.window, self.window_bytes = opened.items, opened.bytes
        self.items_left, self.bytes_left = opened.items, opened.bytes
        self.prefix = item_prefix(opened.stream)
        self.run: Run | None = None
        self.transfer: Transfer | None = None
        self.arriving = Arrival(opened.large) if opened.large else None
        self.traceparent = opened.traceparent
        # Credit for a batch comes back as a whole: small ones, so that both sides work at the same time.
        self.batch = max(1, opened.items // 4)


class Started(NamedTuple):
    """A handler to start."""

    outbound: Outbound
    payload: Raw


class Effects:
    """What the shell must do after a frame or a loss."""

    __slots__ = ("disturbances", "goodbye", "interrupted", "ready", "started")

    def __init__(self) -> None:
        #: handlers to start
        self.started: list[Started] = []
        #: halves whose waiter, if any, has something to go on with
        self.ready: list[Inbound | Outbound] = []
        #: halves whose handler must be closed
        self.interrupted: list[Outbound] = []
        #: messages that cost this side work and move no data, see `Budget`
        self.disturbances = 0
        #: why the peer ends the connection
        self.goodbye: str | None = None
