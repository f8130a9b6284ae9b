"""Universe ``channel``: two session cores, the bytes between them, and applications that open, consume, cancel and end.

What the shell (:mod:`arun.channel.connection`) does between the cores is done here by events: a reader that gets the
peer's bytes in pieces, cut anywhere; a writer that runs only when it was woken and waits while the pipe is full;
handlers and consumers that sleep until the session says that there is something for them. So a wake-up that the core
forgets to ask for leaves somebody asleep for ever, which is what the end of the universe looks for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec

from arun.channel.codec import SESSION_FRAME_BYTES, FrameReader
from arun.channel.halves import Allowed, Batch, Effects, Inbound, Lost, Outbound
from arun.channel.limits import Limits
from arun.channel.messages import Credit, End, Fail, Goodbye, Item, Items, Open, SessionMessage
from arun.channel.session import Session
from arun.errors import ChannelLost, ProtocolError, StreamRefused
from tests.simulation.pipe import Pipe
from tests.simulation.world import Violation, World

__all__ = ("PATHS", "play")

PATHS = (
    "a handler waited for credit in items",
    "a handler waited for credit in bytes",
    "a handler waited for room in the outbox",
    "a writer waited for room in the pipe",
    "a frame of several messages",
    "a frame came in pieces",
    "a cancel crossed the end",
    "a cancel before the handler began",
    "a cancel while items were on their way",
    "a cancel with unread items",
    "a cancelled handler cleaned up for a while",
    "an open was refused",
    "a slot was used again",
    "a handler failed",
    "the connection broke inside a frame",
    "the connection broke with items on their way",
    "the connection broke while a handler cleaned up",
    "a goodbye while handlers ran",
    "both sides said goodbye at once",
    "a goodbye crossed an open",
    "items were read after the connection was lost",
    "an open after the end",
    "a credit crossed the end",
)

# Bytes of an item as it is sent: filling, stream, index and their headers.
LARGEST_ITEM = 40 + 8

_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.decode


class Plan(msgspec.Struct, array_like=True):
    """What a stream is to be like; sent as the payload of its Open.

    :ivar sizes: bytes of filling for each item.
    """

    number: int
    sizes: list[int]
    fails: bool
    pause: int
    clean_up: int


class Consumer:
    """Whoever opened a stream: takes items at its own pace, may leave early."""

    def __init__(self, side: Side, inbound: Inbound, plan: Plan, leaves_after: int, patience: int, pause: int) -> None:
        self.side, self.inbound, self.plan = side, inbound, plan
        self.leaves_after, self.pause = leaves_after, pause
        self.taken = 0
        self.taken_bytes = 0
        #: the batch that is being read, and what of it is not
        self.batch: Batch | None = None
        self.unread: deque[bytes] = deque()
        self.cancelled = False
        self.done = False
        if patience:
            side.world.after(patience, self.leave)

    def step(self) -> None:
        """Go on until there is nothing to take."""
        if self.done:
            return
        side, inbound = self.side, self.inbound
        while inbound.items or self.unread:
            if self.cancelled:
                raise Violation(f"{self}: an item after the cancel")
            payload, due = self._take()
            number, index, _ = _decode(payload)
            if (number, index) != (self.plan.number, self.taken):
                raise Violation(f"{self}: got item {index} of stream {number}, wanted {self.taken}")
            self.taken += 1
            self.taken_bytes += len(payload)
            side.world.note("take", side.name, self.plan.number, index)
            if type(inbound.outcome) is Lost:
                side.world.sometimes("items were read after the connection was lost")
            if due:
                side.wake_writer()
            if self.taken == self.leaves_after:
                self.leave()
                return
            if self.pause:
                side.world.after(side.world.between(0, self.pause), self.step)
                return
        if inbound.outcome is not None:
            self._end(inbound.outcome)
        else:
            side.sleep(inbound, self.step)

    def _take(self) -> tuple[Any, bool]:
        """The next item, and whether credit is due: for a batch, when its last item is taken."""
        session = self.side.session
        if not self.unread and not isinstance(self.inbound.items[0], Batch):
            return session.take(self.inbound)
        if not self.unread:
            self.batch = cast("Batch", self.inbound.items.popleft())
            self.unread.extend(msgspec.msgpack.decode(self.batch.payloads, type=list[msgspec.Raw]))
            if len(self.unread) != self.batch.count or sum(map(len, self.unread)) != self.batch.size:
                raise Violation(f"{self}: a batch of {len(self.unread)} items says {self.batch.count}")
            self.side.world.sometimes("several items came as one message")
        payload = self.unread.popleft()
        if self.unread:
            return payload, False
        batch, self.batch = self.batch, None
        assert batch is not None
        return payload, session.consumed(self.inbound, batch.count, batch.size)

    def leave(self) -> None:
        """Cancel, and wait for the clean-up."""
        if self.done or self.cancelled:
            return
        side, world = self.side, self.side.world
        if self.inbound.items or self.unread:
            world.sometimes("a cancel with unread items")
        on_their_way = self.taken + len(self.unread) + _held(self.inbound)[0]
        self.unread.clear()
        self.batch = None
        self.cancelled = True
        world.note("cancel", side.name, self.plan.number)
        if side.session.cancel(self.inbound):
            side.wake_writer()
            handler = side.peer.handlers.get(self.plan.number)
            if handler is None:
                world.sometimes("a cancel before the handler began")
            elif handler.finished:
                world.sometimes("a cancel crossed the end")
            elif handler.sent > on_their_way:
                world.sometimes("a cancel while items were on their way")
        side.wake(self.inbound)
        side.sleep(self.inbound, self.step)
        if self.inbound.outcome is not None:
            self._end(self.inbound.outcome)

    def _end(self, outcome: End | Fail | Lost) -> None:
        self.done = True
        plan = self.plan
        self.side.world.note("outcome", self.side.name, plan.number, type(outcome).__name__)
        if type(outcome) is Lost:
            if self.side.ended is None:
                raise Violation(f"{self}: lost, though the connection is there")
        elif self.cancelled:
            pass
        elif self.taken != len(plan.sizes) or (type(outcome) is Fail) != plan.fails:
            raise Violation(f"{self}: {type(outcome).__name__} after {self.taken} of {len(plan.sizes)} items")

    def __str__(self) -> str:
        return f"stream {self.plan.number} at {self.side.name}"


class Handler:
    """Whoever serves a stream: sends items as credit allows, cleans up, ends."""

    def __init__(self, side: Side, outbound: Outbound, plan: Plan) -> None:
        self.side, self.outbound, self.plan = side, outbound, plan
        self.sent = 0
        self.sent_bytes = 0
        self.interrupted = False
        self.closing = False
        self.finished = False
        side.world.after(side.world.between(0, plan.pause), self.step)

    def step(self) -> None:
        if self.closing:
            return
        side, outbound, world = self.side, self.outbound, self.side.world
        if outbound.state != "open":
            self.close()
            return
        while self.sent < len(self.plan.sizes):
            payload = _encode((self.plan.number, self.sent, b"x" * self.plan.sizes[self.sent]))
            if not side.session.send(outbound, payload):
                if outbound.state != "open":
                    self.close()
                    return
                kind = "items" if outbound.items_left <= 0 else "bytes"
                world.sometimes(f"a handler waited for credit in {kind}")
                side.sleep(outbound, self.step)
                return
            world.note("send", side.name, self.plan.number, self.sent)
            self.sent += 1
            self.sent_bytes += len(payload)
            side.wake_writer()
            if side.congested:
                world.sometimes("a handler waited for room in the outbox")
                side.wants_room.append(self.step)
                return
            if self.plan.pause:
                world.after(world.between(0, self.plan.pause), self.step)
                return
        self.close()

    def interrupt(self) -> None:
        if self.finished or self.interrupted:
            raise Violation(f"{self}: interrupted {'twice' if self.interrupted else 'after its end'}")
        self.interrupted = True
        self.close()

    def close(self) -> None:
        if self.closing:
            return
        self.closing = True
        self.side.sleepers.pop(self.outbound, None)
        clean_up = self.side.world.between(0, self.plan.clean_up)
        if self.interrupted and clean_up:
            self.side.world.sometimes("a cancelled handler cleaned up for a while")
        self.side.world.after(clean_up, self.finish)

    def finish(self) -> None:
        side, plan = self.side, self.plan
        self.finished = True
        fails = plan.fails and self.sent == len(plan.sizes)
        if fails:
            side.world.sometimes("a handler failed")
        side.world.note("finish", side.name, plan.number, fails)
        side.session.finish(self.outbound, Fail(self.outbound.id, "E", "", "") if fails else End(self.outbound.id))
        side.running -= 1
        side.wake_writer()
        side.handler_ended()

    def __str__(self) -> str:
        return f"handler of stream {self.plan.number} at {self.side.name}"


class Side:
    """One end: its session core, and what the shell would do around it."""

    def __init__(self, world: World, name: str, limits: Limits, peers_limits: Limits, out: Pipe, delay: int) -> None:
        self.world, self.name, self.limits = world, name, limits
        self.streams_allowed = peers_limits.streams
        self.session = Session(peer="peer", limits=limits, allowed=Allowed(peers_limits.streams, 2**20))
        self.reader: FrameReader[SessionMessage] = FrameReader("peer", SessionMessage, SESSION_FRAME_BYTES)
        self.out = out
        self.delay = delay
        self.peer: Side
        self.consumers: list[Consumer] = []
        self.handlers: dict[int, Handler] = {}
        self.sleepers: dict[Inbound | Outbound, Callable[[], object]] = {}
        self.wants_room: list[Callable[[], object]] = []
        self.running = 0
        self.half_frame = False
        #: why the connection ended, as the shell's `_reason`
        self.ended: str | None = None
        self.broken = False
        self.finishing = False
        self.eof_sent = self.eof_got = False
        self._writer = "idle"

    # Applications.

    def open(self, plan: Plan, window: int, leaves_after: int, patience: int, pause: int) -> None:
        world, session = self.world, self.session
        # A stream counts until its End has come.
        taken = sum(1 for consumer in self.consumers if type(consumer.inbound.outcome) not in {End, Fail})
        try:
            inbound = session.open("m", _encode(plan), window)
        except ChannelLost:
            world.sometimes("an open after the end")
            if self.ended is None:
                raise Violation(f"{self.name}: lost, though the connection is there") from None
            return
        except StreamRefused:
            world.sometimes("an open was refused")
            if taken < self.streams_allowed:
                raise Violation(f"{self.name}: refused, with {taken} of {self.streams_allowed} slots taken") from None
            return
        if taken >= self.streams_allowed or self.ended is not None:
            raise Violation(f"{self.name}: {taken + 1} streams of {self.streams_allowed} open")
        if len(self.consumers) >= self.streams_allowed:
            world.sometimes("a slot was used again")
        world.note("open", self.name, plan.number, window)
        consumer = Consumer(self, inbound, plan, leaves_after, patience, pause)
        self.consumers.append(consumer)
        self.wake_writer()
        if leaves_after:
            consumer.step()
        else:
            consumer.leave()

    def sleep(self, half: Inbound | Outbound, then: Callable[[], object]) -> None:
        """Until the session says that something happened to this half."""
        self.sleepers[half] = then

    def wake(self, half: Inbound | Outbound) -> None:
        then = self.sleepers.pop(half, None)
        if then is not None:
            self.world.after(self.world.below(2), then)

    # The shell's tasks.

    def wake_writer(self) -> None:
        if self._writer == "idle":
            self._writer = "woken"
            self.world.after(self.world.between(0, self.delay), self._write)

    def pipe_drained(self) -> None:
        if self._writer == "blocked" and self.out.waiting <= self.out.capacity:
            self._writer = "woken"
            self.world.after(0, self._write)

    @property
    def congested(self) -> bool:
        return self.session.outbox.size > self.limits.send_buffer

    def _write(self) -> None:
        if self.broken or self.eof_sent:
            return
        before = self.session.outbox.taken
        frame = self.session.take_frame()
        if frame is None:
            self._writer = "idle"
            if self.finishing:
                self.eof_sent = True
                self.out.push_eof()
            return
        self.world.note("frame", self.name, len(frame))
        if self.session.outbox.taken - before > 1:
            self.world.sometimes("a frame of several messages")
        self.out.push(frame)
        if self.wants_room and not self.congested:
            for then in self.wants_room:
                self.world.after(0, then)
            self.wants_room.clear()
        if self.out.waiting > self.out.capacity and not self.out.broken:
            self.world.sometimes("a writer waited for room in the pipe")
            self._writer = "blocked"
        else:
            self.world.after(0, self._write)

    def arrived(self, piece: bytes) -> None:
        if self.broken:
            return
        reader = self.reader
        reader.feed(piece)
        try:
            while (messages := reader.next_frame()) is not None:
                for message in messages:
                    if type(message) not in {Item, Items}:
                        self._log_control(message)
                self.apply(self.session.receive(messages))
        except ProtocolError as exc:
            raise Violation(f"{self.name}: an honest peer broke the protocol: {exc}") from exc

    def _log_control(self, message: Any) -> None:
        world, stream = self.world, getattr(message, "stream", 0)
        world.note("got", self.name, type(message).__name__, stream)
        ends = [side.ended or "" for side in (self, self.peer)]
        if type(message) is Goodbye and all(end.startswith("closed") for end in ends):
            world.sometimes("both sides said goodbye at once")
        elif type(message) is Open and self.ended is not None:
            world.sometimes("a goodbye crossed an open")
        elif type(message) is Credit and any(
            one.finished and one.outbound.id == stream for one in self.handlers.values()
        ):
            world.sometimes("a credit crossed the end")

    def end_of_stream(self) -> None:
        self.eof_got = True
        if self.ended is None:
            raise Violation(f"{self.name}: the end of the bytes before a goodbye")

    def apply(self, effects: Effects) -> None:
        for outbound, payload in effects.started:
            plan = msgspec.msgpack.decode(payload, type=Plan)
            self.world.note("start", self.name, plan.number)
            self.running += 1
            self.handlers[plan.number] = Handler(self, outbound, plan)
        for half in effects.ready:
            self.wake(half)
        for outbound in effects.interrupted:
            handler = next(one for one in self.handlers.values() if one.outbound is outbound)
            handler.interrupt()
        if effects.goodbye is not None:
            self.end(f"goodbye: {effects.goodbye}")
        if self.session.talkative:
            self.wake_writer()

    def end(self, reason: str, *, broken: bool = False) -> None:
        """Begin the end; the first reason counts."""
        if broken:
            self.broken = True
            self.wants_room, waiting = [], self.wants_room
            for then in waiting:
                self.world.after(0, then)
        if self.ended is not None:
            return
        self.world.note("end", self.name, reason)
        if self.running:
            cleaning = any(one.closing and not one.finished for one in self.handlers.values())
            if broken and cleaning:
                self.world.sometimes("the connection broke while a handler cleaned up")
            elif not broken:
                self.world.sometimes("a goodbye while handlers ran")
        self.ended = reason
        self.apply(self.session.close(reason))
        self.handler_ended()

    def handler_ended(self) -> None:
        if self.ended is not None and not self.running and not self.finishing and not self.broken:
            self.session.say_goodbye(self.ended)
            self.finishing = True
            self.wake_writer()


def play(world: World) -> None:
    """One universe."""
    delay = world.pick((0, 1, 3, 12))
    capacity = world.pick((0, 60, 400))
    pieces = world.pick((1, 2, 4))
    pipes = [Pipe(world, capacity, delay, pieces) for _ in range(2)]
    limits = [
        Limits(
            streams=world.between(1, 3),
            window_bytes=world.pick((1, 30, 90, 10_000)),
            send_buffer=world.pick((1, 60, 10_000)),
        )
        for _ in range(2)
    ]
    lag = world.pick((0, 1, 4))
    sides = [Side(world, name, limits[i], limits[1 - i], pipes[i], lag) for i, name in enumerate("ab")]
    for i in range(2):
        pipes[i].writer, pipes[i].reader = sides[i], sides[1 - i]
        sides[i].peer = sides[1 - i]

    busy = world.pick((5, 20, 60))
    largest = world.pick((0, 8, 40))
    for number in range(1, world.between(2, 9)):
        items = world.pick((0, 1, 2, 3, 5, 9))
        plan = Plan(
            number,
            sizes=[world.between(0, largest) for _ in range(items)],
            fails=world.chance(15),
            pause=world.pick((0, 0, 1, 5)),
            clean_up=world.pick((0, 0, 2, 15)),
        )
        leaves_after = world.between(0, items) if world.chance(25) else -1
        patience = world.between(1, 40) if world.chance(30) else 0
        window = world.pick((1, 2, 3, 4, 7, 16))
        pause = world.pick((0, 0, 1, 4))
        world.after(world.below(busy), world.pick(sides).open, plan, window, leaves_after, patience, pause)

    ending = world.below(10)
    if ending < 2:
        world.after(world.below(busy + 20), _close, sides)
    elif ending < 4:
        world.after(world.below(busy + 20), _cut, sides, pipes)

    def check() -> None:
        for side in sides:
            _check(side)

    world.run(check, horizon=20_000)
    for side in sides:
        _check_quiet(side)
    if sides[0].ended is None and sides[1].ended is None:
        world.pick(sides).end("closed: all is done")
        world.run(check, horizon=20_000)
    for side in sides:
        _check_gone(side)


def _close(sides: list[Side]) -> None:
    side = sides[0].world.pick(sides)
    side.end("closed: wanted")
    if side.world.chance(30):
        side.peer.end("closed: wanted, too")


def _cut(sides: list[Side], pipes: list[Pipe]) -> None:
    world = sides[0].world
    if all(side.eof_got for side in sides):
        return
    for pipe in pipes:
        pipe.cut()
    world.note("cut")
    for side in sides:
        world.after(world.between(0, 5), _learn, side)


def _learn(side: Side) -> None:
    # The reader of the real shell would find a frame that never becomes whole.
    if side.reader.held:
        side.world.sometimes("the connection broke inside a frame")
    side.end("broke", broken=True)


def _check(side: Side) -> None:
    """The invariants that hold after every event."""
    limits, running = side.limits, 0
    for handler in side.handlers.values():
        outbound = handler.outbound
        if handler.finished:
            if outbound.state != "closed" and side.ended is None:
                raise Violation(f"{handler}: {outbound.state} after its end")
        else:
            running += 1
            if not 0 <= outbound.items_left <= outbound.window or outbound.bytes_left > outbound.window_bytes:
                raise Violation(f"{handler}: credit of {outbound.items_left} items, {outbound.bytes_left} bytes")
    if side.ended is None and running > len(side.session._outbound):
        raise Violation(f"{side.name}: {running} handlers have {len(side.session._outbound)} slots")
    if running > limits.streams:
        raise Violation(f"{side.name}: {running} handlers, {limits.streams} allowed")
    peer = side.peer
    for consumer in side.consumers:
        inbound = consumer.inbound
        if consumer.cancelled:
            if inbound.items:
                raise Violation(f"{consumer}: keeps items after the cancel")
            continue
        if inbound.state == "open":
            unread, unread_bytes = _held(inbound)
            if consumer.batch is not None:
                unread, unread_bytes = unread + consumer.batch.count, unread_bytes + consumer.batch.size
            granted = inbound.items_left + unread + inbound.items_used
            if granted != inbound.window:
                raise Violation(f"{consumer}: credit for {granted} items in a window of {inbound.window}")
            granted = inbound.bytes_left + unread_bytes + inbound.bytes_used
            if granted != inbound.window_bytes:
                raise Violation(f"{consumer}: credit for {granted} bytes in a window of {inbound.window_bytes}")
            handler = peer.handlers.get(consumer.plan.number)
            if handler is not None and peer.ended is None:
                if handler.sent - consumer.taken > inbound.window:
                    raise Violation(
                        f"{consumer}: {handler.sent - consumer.taken} items in a window of {inbound.window}"
                    )
                # One item may overshoot the bytes.
                if handler.sent_bytes - consumer.taken_bytes >= inbound.window_bytes + LARGEST_ITEM:
                    raise Violation(f"{consumer}: {handler.sent_bytes - consumer.taken_bytes} bytes are unread")
                if handler.outbound.items_left > inbound.items_left:
                    raise Violation(f"{handler}: has credit that was not granted")


def _held(inbound: Inbound) -> tuple[int, int]:
    """Items and bytes that arrived and nobody has begun to read."""
    batches = [entry for entry in inbound.items if isinstance(entry, Batch)]
    single = [len(entry) for entry in inbound.items if not isinstance(entry, Batch)]
    return sum(batch.count for batch in batches) + len(single), sum(batch.size for batch in batches) + sum(single)


def _check_quiet(side: Side) -> None:
    """What must be true once nothing more happens: nobody waits."""
    for handler in side.handlers.values():
        if not handler.finished:
            raise Violation(f"{handler}: never ended, after {handler.sent} of {len(handler.plan.sizes)} items")
    for consumer in side.consumers:
        if not consumer.done:
            raise Violation(f"{consumer}: waits for ever, after {consumer.taken} of {len(consumer.plan.sizes)} items")
    if side.ended is None:
        if side.session.talkative:
            raise Violation(f"{side.name}: has something to say that nobody asks for")
        if side.session._outbound or side.session._inbound:
            raise Violation(f"{side.name}: slots are taken though no stream is open")


def _check_gone(side: Side) -> None:
    """What must be true once the connection has ended."""
    _check_quiet(side)
    if side.ended is None or not (side.broken or (side.eof_sent and side.eof_got)):
        raise Violation(f"{side.name}: the connection never ended")
    for consumer in side.consumers:
        handler = side.peer.handlers.get(consumer.plan.number)
        if handler is not None and handler.sent < consumer.taken:
            raise Violation(f"{consumer}: took more than was sent")
