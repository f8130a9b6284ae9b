"""The session core: every decision about streams and credit on one connection. No I/O, no clock.

Theory of operation
-------------------

Either side of a connection may open streams. A *stream* is one run of the peer's handler: the opener
sends Open, the handler's side answers with Items and, last of all, one End or Fail::

    opener                        handler's side
    Open(method, credit)  ----->  starts the handler
                          <-----  Item, Item, ...       each uses up credit
    Credit                ----->  when half the window is consumed
    Cancel                ----->  the handler is closed, its clean-up awaited
                          <-----  End | Fail            always, also after Cancel

1. Each side numbers the streams that it opens, from 1, never reusing a number. Open, Credit and Cancel
   only go from opener to handler, the others only back, so the two sides' numbers can't clash.
2. Each side keeps a half of every stream: the opener an `Inbound` (items come in), the handler's side
   an `Outbound`. Both are in the same states, and one table, `TRANSITIONS`, tells what each message
   does to them, whoever sends it. A message that the table has no entry for ends the connection.
3. Credit is counted in items and in bytes. A handler may send while both are above zero (one item may
   overshoot the bytes); the opener gives back what its consumer has taken when that is half a window.
   So at most a window lies unread at the opener, and what is granted never exceeds the window.
4. A slot is the right to have one stream open. It is taken by Open and free only once the End or Fail
   is on its way in a frame: a cancelled stream that still cleans up counts, and a peer that does not
   read gets no new slots. The opener, which sees the End later, never counts fewer than the handler's
   side, so an Open beyond the announced limit is no race but a breach.
5. A payload that is too large for one frame is announced, by Open or LargeItem, and follows in parts.
   Nothing else is said on the stream meanwhile, save Cancel and Fail, after which the parts stop. A
   handler starts, and an item counts as arrived, when the last part is there.
6. Nothing here grows without a bound: credits to be sent are merged per stream, Pongs to the latest.

The shell (:mod:`arun.channel.connection`) feeds in frames and calls of its user, and does what the
returned `Effects` say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from msgspec import Raw

from arun.channel.codec import INLINE_BYTES, array_head, encode_message
from arun.channel.halves import Allowed, Arrival, Batch, Effects, Inbound, Lost, Outbound, Started, State
from arun.channel.messages import (
    Cancel,
    Credit,
    End,
    Fail,
    Goodbye,
    Item,
    ItemPart,
    Items,
    LargeItem,
    Open,
    OpenPart,
    Ping,
    Pong,
    SessionMessage,
)
from arun.channel.outbox import Outbox, Transfer
from arun.channel.statistics import ConnectionStatistics
from arun.errors import ProtocolError, StreamRefused

if TYPE_CHECKING:
    from arun.channel.codec import Payload
    from arun.channel.limits import Limits

__all__ = ("TRANSITIONS", "Session")

TRANSITIONS: dict[type[SessionMessage], dict[State, State]] = {
    Open: {"idle": "open"},
    # Items may be under way when the opener cancels.
    Item: {"open": "open", "cancelling": "cancelling"},
    Items: {"open": "open", "cancelling": "cancelling"},
    LargeItem: {"open": "open", "cancelling": "cancelling"},
    ItemPart: {"open": "open", "cancelling": "cancelling"},
    # As well as Credit and Cancel, if the handler's side closes.
    OpenPart: {"open": "open", "closed": "closed"},
    # Credit and Cancel may be under way when the handler ends.
    Credit: {"open": "open", "closed": "closed"},
    Cancel: {"open": "cancelling", "closed": "closed"},
    End: {"open": "closed", "cancelling": "closed"},
    Fail: {"open": "closed", "cancelling": "closed"},
}


class Session:
    """State of one connection after authentication.

    :param peer: the peer's name, for errors.
    :param limits: this side's limits.
    :param allowed: the peer's, as far as it announced them.
    """

    __slots__ = (
        "_breached",
        "_closing",
        "_credit_due",
        "_finished",
        "_inbound",
        "_last_served",
        "_limits",
        "_next_stream",
        "_outbound",
        "_pong_due",
        "_refused",
        "_served",
        "allowed",
        "frames_received",
        "items_received",
        "late_items",
        "outbox",
        "peer",
    )

    def __init__(self, *, peer: str, limits: Limits, allowed: Allowed) -> None:
        self.peer = peer
        self.allowed = allowed
        self.outbox = Outbox()
        self._limits = limits
        self._inbound: dict[int, Inbound] = {}
        self._outbound: dict[int, Outbound] = {}
        #: streams whose End is in the outbox, with the number of the message that it is there
        self._finished: deque[tuple[int, Outbound]] = deque()
        self._next_stream = 1
        self._last_served = 0
        self._credit_due: dict[int, Inbound] = {}
        self._pong_due: int | None = None
        self._closing: Lost | None = None
        self._refused = self._served = 0
        self.frames_received = self.items_received = self.late_items = 0
        #: what a frame has done that is not through, or broke the protocol
        self._breached: Effects | None = None

    # The opener's side.

    @property
    def opened(self) -> int:
        """Streams that this side opened and that have not ended."""
        return len(self._inbound)

    def open(self, method: str, payload: Payload, window: int, traceparent: str = "") -> Inbound:
        """Open a stream.

        :param window: items that the peer may send ahead of the consumer.
        :param traceparent: where in a trace the opener is.
        :raises StreamRefused: the peer's streams are all taken.
        :raises ChannelLost: the connection has ended.
        """
        if self._closing is not None:
            raise self._closing.error()
        if len(self._inbound) >= self.allowed.streams:
            self._refused += 1
            raise StreamRefused(
                f"{self.peer} serves {self.allowed.streams} streams at once and all are open or still cleaning up; "
                f"end some before opening {method!r}, or raise Limits(streams=...) there"
            )
        inbound = Inbound(self._next_stream, method, window, self._limits.window_bytes)
        if len(payload) <= INLINE_BYTES:  # so it is in one piece
            opened = Open(inbound.id, method, window, inbound.window_bytes, Raw(payload), 0, traceparent)  # type: ignore[arg-type]  # as said
            self._send(opened)
        else:
            opened = Open(inbound.id, method, window, inbound.window_bytes, _NIL, len(payload), traceparent)
            self._transfer(inbound, opened, OpenPart, payload)
        self._next_stream += 1
        self._inbound[inbound.id] = inbound
        return inbound

    def take(self, inbound: Inbound) -> tuple[Raw | Batch, bool]:
        """Consume the oldest item or batch; also tells whether credit is now due, so that the writer must wake."""
        entry = inbound.items.popleft()
        if isinstance(entry, Batch):
            return entry, self.consumed(inbound, entry.count, entry.size)
        return entry, self.consumed(inbound, 1, len(entry))

    def consumed(self, inbound: Inbound, items: int, size: int) -> bool:
        """Items that were popped are used up; tells whether credit is now due, so that the writer must wake."""
        inbound.items_used += items
        inbound.bytes_used += size
        if inbound.items_used * 2 < inbound.window and inbound.bytes_used * 2 < inbound.window_bytes:
            return False
        if inbound.state != "open":
            return False
        self._credit_due[inbound.id] = inbound
        return True

    def cancel(self, inbound: Inbound) -> bool:
        """Want no more items, and drop the unread ones. Tells whether there is a Cancel to write."""
        inbound.items.clear()
        if inbound.state != "open" or self._closing is not None:
            return False
        self._advance(inbound, inbound.id, Cancel)
        self._credit_due.pop(inbound.id, None)
        inbound.arriving = None
        self._drop_transfer(inbound)
        self._send(Cancel(inbound.id))
        return True

    # The handler's side.

    def send(self, outbound: Outbound, payload: Payload) -> bool:
        """Send an item, if the stream is open and has credit; tells whether it was sent.

        Where that leaves the stream with a ``transfer``, the next item must wait until it has none.
        """
        if outbound.items_left <= 0 or outbound.bytes_left <= 0 or outbound.state != "open":
            return False
        size = len(payload)
        outbound.items_left -= 1
        outbound.bytes_left -= size
        if size > INLINE_BYTES:
            outbound.run = None  # nothing may overtake it
            self._transfer(outbound, LargeItem(outbound.id, size), ItemPart, payload)
            return True
        run = outbound.run
        if run is None or not run.left or run.room < size:
            run = outbound.run = self.outbox.append_run(outbound.prefix, outbound.batch)
        run.payloads.append(payload)  # type: ignore[arg-type]  # bytes: what is small is never in pieces
        run.room -= size
        run.left = run.left - 1 if run.room > INLINE_BYTES // 2 else 0
        run.size += size
        self.outbox.size += size
        return True

    def finish(self, outbound: Outbound, message: End | Fail) -> None:
        """The handler is through and has cleaned up. Its slot is free once the message is in a frame."""
        if self._closing is not None:
            # An End now would pass for the stream's own; the peer learns of the loss by our Goodbye.
            return
        self._advance(outbound, outbound.id, type(message))
        self._drop_transfer(outbound)
        self._send(message)
        self._finished.append((self.outbox.appended, outbound))

    # Both.

    def receive(self, messages: list[SessionMessage]) -> Effects:
        """Take the messages of one frame.

        :raises ProtocolError: the peer broke the protocol; nothing of the connection can be trusted.
        """
        effects = self._breached = Effects()
        self.frames_received += 1
        for message in messages:
            if type(message) is Item:
                self._on_items(message, 1, 0, message.payload, effects)
            elif type(message) is Items:
                self._on_items(message, *array_head(message.payloads), message.payloads, effects)
            else:
                _ON[type(message)](self, message, effects)
        self._breached = None
        return effects

    def _on_items(self, message: Item | Items, count: int, head: int, raw: Raw, effects: Effects) -> None:
        inbound = self._inbound.get(message.stream)
        if inbound is None:
            raise self._illegal(type(message), message.stream, self._inbound_state(message.stream))
        if count < 1:
            raise ProtocolError(f"{self.peer} sent Items without any on {inbound.method!r}")
        inbound.items_left -= count
        if inbound.items_left < 0 or inbound.bytes_left <= 0:
            raise ProtocolError(f"{self.peer} sent more on {inbound.method!r} than its credit")
        if inbound.arriving is not None:
            raise self._within_an_item(type(message), inbound)
        size = len(raw) - head
        inbound.bytes_left -= size
        if inbound.state != "open":
            self.late_items += count
            return
        inbound.received += count
        self.items_received += count
        if not inbound.items:
            effects.ready.append(inbound)
        raw = _own(raw)
        inbound.items.append(Batch(count, size, raw) if head else raw)

    def _on_end(self, message: End | Fail, effects: Effects) -> None:
        inbound = self._inbound.get(message.stream)
        if inbound is None:
            raise self._illegal(type(message), message.stream, self._inbound_state(message.stream))
        if inbound.arriving is not None and isinstance(message, End):
            raise self._within_an_item(End, inbound)
        self._advance(inbound, message.stream, type(message))
        inbound.arriving = None
        self._drop_transfer(inbound)
        del self._inbound[message.stream]
        self._credit_due.pop(message.stream, None)
        inbound.outcome = inbound.outcome or message
        effects.ready.append(inbound)

    def _on_ping(self, message: Ping, effects: Effects) -> None:
        self._pong_due = message.number
        effects.disturbances += 1

    def _on_pong(self, message: Pong, effects: Effects) -> None:
        raise ProtocolError(f"{self.peer} answered a Ping that was never sent")

    def _on_goodbye(self, message: Goodbye, effects: Effects) -> None:
        effects.goodbye = message.reason

    def _on_open(self, message: Open, effects: Effects) -> None:
        if message.stream <= self._last_served:
            raise self._illegal(Open, message.stream, "closed")
        self._last_served = message.stream
        self._served += 1
        if self._closing is not None:
            return
        if len(self._outbound) >= self._limits.streams:
            raise ProtocolError(
                f"{self.peer} opened {message.method!r} beyond the {self._limits.streams} streams that it may have"
            )
        if message.large > self._limits.message_bytes:
            raise self._too_large(message.method, message.large)
        outbound = self._outbound[message.stream] = Outbound(message)
        if outbound.arriving is None:
            effects.started.append(Started(outbound, _own(message.payload)))

    def _on_open_part(self, message: OpenPart, effects: Effects) -> None:
        outbound = self._half_of(message)
        if outbound is None:
            return
        self._advance(outbound, message.stream, OpenPart)
        if outbound.arriving is None:
            raise ProtocolError(f"{self.peer} sent more of the payload of {outbound.method!r} than it announced")
        if outbound.arriving.add(message.data, f"{self.peer} sent a payload of {outbound.method!r}"):
            effects.started.append(Started(outbound, Raw(outbound.arriving.data)))
            outbound.arriving = None

    def _on_large_item(self, message: LargeItem | ItemPart, effects: Effects) -> None:
        inbound = self._inbound.get(message.stream)
        if inbound is None:
            raise self._illegal(type(message), message.stream, self._inbound_state(message.stream))
        if isinstance(message, LargeItem):
            if inbound.arriving is not None:
                raise self._within_an_item(LargeItem, inbound)
            inbound.items_left -= 1
            if inbound.items_left < 0 or inbound.bytes_left <= 0:
                raise ProtocolError(f"{self.peer} sent more on {inbound.method!r} than its credit")
            if message.bytes > self._limits.message_bytes:
                raise self._too_large(inbound.method, message.bytes)
            inbound.bytes_left -= message.bytes
            if inbound.state == "open":
                inbound.arriving = Arrival(message.bytes)
            else:
                self.late_items += 1
        elif inbound.state == "open":  # else late: nobody keeps it
            if inbound.arriving is None:
                raise ProtocolError(f"{self.peer} sent more of an item of {inbound.method!r} than it announced")
            if inbound.arriving.add(message.data, f"{self.peer} sent an item of {inbound.method!r}"):
                if not inbound.items:
                    effects.ready.append(inbound)
                inbound.received += 1
                self.items_received += 1
                inbound.items.append(Raw(inbound.arriving.data))
                inbound.arriving = None

    def _half_of(self, message: OpenPart | Credit | Cancel) -> Outbound | None:
        """The half that an opener's message is for; None if it is late."""
        outbound = self._outbound.get(message.stream)
        if outbound is None and message.stream > self._last_served:
            raise self._illegal(type(message), message.stream, "idle")
        return outbound

    def _on_opener(self, message: Credit | Cancel, effects: Effects) -> None:
        outbound = self._half_of(message)
        if outbound is None:
            return
        before = outbound.state
        self._advance(outbound, message.stream, type(message))
        if before == "closed":
            return
        if isinstance(message, Cancel):
            if outbound.arriving is not None:  # its handler only says that it has ended
                effects.started.append(Started(outbound, _NIL))
                outbound.arriving = None
            self._drop_transfer(outbound)
            effects.interrupted.append(outbound)
            effects.disturbances += 1
            return
        outbound.items_left += message.items
        outbound.bytes_left += message.bytes
        if outbound.items_left > outbound.window or outbound.bytes_left > outbound.window_bytes:
            raise ProtocolError(f"{self.peer} granted more credit on {outbound.method!r} than its window")
        effects.ready.append(outbound)

    def statistics(self, bytes_received: int) -> ConnectionStatistics:
        """What it has done and what is under way."""
        return ConnectionStatistics(
            bytes_sent=self.outbox.bytes,
            bytes_received=bytes_received,
            frames_sent=self.outbox.frames,
            frames_received=self.frames_received,
            items_sent=self.outbox.items,
            items_received=self.items_received,
            late_items=self.late_items,
            streams_opened=self._next_stream - 1,
            streams_served=self._served,
            streams_refused=self._refused,
            open_streams=len(self._inbound),
            served_streams=len(self._outbound),
            without_credit=sum(half.items_left <= 0 or half.bytes_left <= 0 for half in self._outbound.values()),
            waiting_bytes=self.outbox.size,
        )

    @property
    def talkative(self) -> bool:
        """Whether ``take_frame`` has something to give."""
        return bool(self.outbox.pending or self._credit_due or self._pong_due)

    def take_frame(self) -> bytes | None:
        """The next frame to write, or None when there is nothing to say."""
        for inbound in self._credit_due.values():
            self._send(Credit(inbound.id, inbound.items_used, inbound.bytes_used))
            inbound.items_left += inbound.items_used
            inbound.bytes_left += inbound.bytes_used
            inbound.items_used = inbound.bytes_used = 0
        self._credit_due.clear()
        if self._pong_due is not None:
            self._send(Pong(self._pong_due))
            self._pong_due = None
        frame = self.outbox.take_frame()
        while self._finished and self._finished[0][0] <= self.outbox.taken:
            self._outbound.pop(self._finished.popleft()[1].id, None)
        return frame

    def close(self, reason: str, cause: BaseException | None = None) -> Effects:
        """The connection ends, for whatever reason: fail what is open, close the handlers.

        Streams that the peer serves for us are cancelled too, so that it cleans up meanwhile. Calling it
        again changes nothing.
        """
        if self._closing is not None:
            return Effects()
        # A frame that breaks the protocol half way has had effects, which nobody was told.
        effects = self._breached or Effects()
        effects.started.clear()
        lost = Lost(reason, cause)
        for inbound in self._inbound.values():
            if inbound.state == "open":
                self._advance(inbound, inbound.id, Cancel)
                inbound.arriving = None
                self._drop_transfer(inbound)
                self._send(Cancel(inbound.id))
            inbound.outcome = lost
        self._credit_due.clear()
        self._closing = lost
        effects.ready += [*self._inbound.values(), *self._outbound.values()]
        for outbound in self._outbound.values():
            outbound.arriving = None
            self._drop_transfer(outbound)
            if outbound.state == "open":
                self._advance(outbound, outbound.id, Cancel)
                effects.interrupted.append(outbound)
        # Forgotten, so that Credit and Cancel that are under way are taken as late.
        self._outbound.clear()
        return effects

    def say_goodbye(self, reason: str) -> None:
        """Queue the last message of this side.

        :param reason: for the peer's errors; cut to 1,024 characters.
        """
        self._send(Goodbye(reason[:1024]))

    def _transfer(
        self,
        owner: Inbound | Outbound,
        announced: Open | LargeItem,
        part: type[OpenPart | ItemPart],
        payload: Payload,
    ) -> None:
        owner.transfer = Transfer(owner, encode_message(announced), part, payload)
        self.outbox.append_transfer(owner.transfer)

    def _drop_transfer(self, owner: Inbound | Outbound) -> None:
        if owner.transfer is not None:
            self.outbox.drop(owner.transfer)
            owner.transfer = None

    def _send(self, message: SessionMessage) -> None:
        self.outbox.append(encode_message(message))

    def _advance(self, half: Inbound | Outbound, stream: int, kind: type[SessionMessage]) -> None:
        state = TRANSITIONS[kind].get(half.state)
        if state is None:
            raise self._illegal(kind, stream, half.state)
        half.state = state

    def _inbound_state(self, stream: int) -> State:
        return "closed" if stream < self._next_stream else "idle"

    def _within_an_item(self, kind: type[SessionMessage], inbound: Inbound) -> ProtocolError:
        return ProtocolError(
            f"{self.peer} sent {kind.__name__} on {inbound.method!r} within an item that came in parts"
        )

    def _too_large(self, method: str, size: int) -> ProtocolError:
        return ProtocolError(
            f"{self.peer} announced {size} bytes for {method!r}; {self._limits.message_bytes} are legal here"
        )

    def _illegal(self, kind: type[SessionMessage], stream: int, state: State) -> ProtocolError:
        return ProtocolError(f"{self.peer} sent {kind.__name__} for stream {stream}, which is {state}")


# What a session does with a message; items apart, which are most of them.
_ON: dict[type[SessionMessage], Callable[[Session, Any, Effects], None]] = {
    Open: Session._on_open,
    OpenPart: Session._on_open_part,
    LargeItem: Session._on_large_item,
    ItemPart: Session._on_large_item,
    Credit: Session._on_opener,
    Cancel: Session._on_opener,
    End: Session._on_end,
    Fail: Session._on_end,
    Ping: Session._on_ping,
    Pong: Session._on_pong,
    Goodbye: Session._on_goodbye,
}


def _own(payload: Raw) -> Raw:
    """A payload is a view of all the bytes that arrived with it; a small one must not keep those in memory."""
    return payload.copy() if len(payload) < _VIEW_BYTES else payload


_NIL = Raw(b"\xc0")
# As much as one read from a socket gives.
_VIEW_BYTES = 2**18
