"""Connection: the async shell around a session core: a wire that carries its frames, a task per handler."""

from __future__ import annotations

import asyncio
import functools
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from arun.channel.codec import SESSION_FRAME_BYTES, FrameReader, decoder_for, encode_payload
from arun.channel.halves import Allowed, Batch, Effects, Inbound, Outbound
from arun.channel.limits import Budget
from arun.channel.messages import End, Fail, SessionMessage
from arun.channel.serving import Handler, Interrupt, serve
from arun.channel.session import Session
from arun.channel.stream import Stream, ending
from arun.channel.tracing import traceparent
from arun.errors import MisuseError, PayloadError, ProtocolError
from arun.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from msgspec import Raw

    from arun.channel.limits import Limits
    from arun.channel.statistics import ConnectionStatistics
    from arun.channel.wire import Wire
    from arun.runtime import Background, Runtime

__all__ = ("Connection",)

log = get_logger("arun.channel")

# Seconds for which a peer that is over its budget is not read at a time.
_LONGEST_PAUSE = 1.0
# After so many frames of one peer, which may be tiny, others have their turn.
_FRAMES_A_TURN = 256


class Connection:
    """One authenticated connection over which either side opens any number of typed streams.

    Made by ``connect_tcp``, ``connect_unix``, ``memory_pair`` or a :class:`~arun.channel.Server`. Its
    tasks belong to the current Runtime, so it is bound to no frame; end it with ``aclose()``.

    :ivar peer: the peer's name, such as ``127.0.0.1:4711``, ``unix:/run/a.sock`` or ``memory``.
    :ivar limits: of this side.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        runtime: Runtime,
        peer: str,
        handler: Handler | None,
        limits: Limits,
        allowed: Allowed,
        reader: FrameReader[SessionMessage] | None = None,
        on_closed: Callable[[Connection], object] | None = None,
    ) -> None:
        self.peer = peer
        self.session = Session(peer=peer, limits=limits, allowed=allowed)
        self._wire = wire
        #: there is something to write; whatever else is pending when the writer runs goes along
        self.wake_writer: Callable[[], None] = wire.wake
        #: the same, and at once if that can be done without waiting
        self.flush_writer: Callable[[], None] = wire.flush
        self._handler = handler or _refuse
        self.limits = limits
        self._reader = reader or FrameReader(peer, SessionMessage, SESSION_FRAME_BYTES)
        self._on_closed = on_closed
        self._bytes_received = 0
        self._waiters: dict[Inbound | Outbound, list[Callable[[], None]]] = {}
        self._interrupts: dict[Outbound, Interrupt] = {}
        self._handlers: dict[Outbound, asyncio.Task[None] | Background[None]] = {}
        self._room: anyio.Event | None = None
        self._reason: str | None = None
        self._broken = False
        self._discarding = False
        self._ending = anyio.Event()
        self._peer_done = anyio.Event()
        self._closed = anyio.Event()
        self._loop = _asyncio_loop()
        self._token = current_token()
        # What arrives is handed over in a callback of the event loop, where anyio knows of none.
        self._now = anyio.current_time if self._loop is None else self._loop.time
        self._budget = Budget(limits.disturbances, limits.streams, self._now())
        self._post = _thread_safe_post()
        self._runtime = runtime
        runtime.start(self._run, name=f"channel to {peer}")
        wire.start(self, runtime, f"channel to {peer}")

    def __repr__(self) -> str:
        return f"<Connection to {self.peer}, {'open' if self._reason is None else self._reason}>"

    @property
    def closed(self) -> bool:
        """Whether the connection has ended or is ending: ``open`` would raise ChannelLost."""
        return self._reason is not None

    def statistics(self) -> ConnectionStatistics:
        """What the connection has done so far and what is under way."""
        return self.session.statistics(self._bytes_received)

    def open(self, method: str, payload: object = None, *, item_type: Any = Any, window: int = 1024) -> Stream[Any]:
        """Start a run of the peer's handler and return its items as they come.

        The request is queued at once; nothing needs to be awaited for it to be sent.

        :param method: what the peer's handler is asked for, 1 to 512 characters.
        :param payload: anything that msgspec encodes, and extension types; encoded here. The memory of arrays must
            stay as it is until the first item has come.
        :param item_type: the type that each item is decoded into; Any gives msgspec's builtins.
        :param window: items that may lie unread here before the peer's handler has to wait.
        :raises PayloadError: the payload can't be encoded or is too large, or nothing can be decoded
            into item_type.
        :raises StreamRefused: the peer's streams are all taken.
        :raises ChannelLost: the connection has ended.
        :raises MisuseError: on another event loop than the connection's, or in another thread.
        """
        decoder = decoder_for(item_type)
        inbound = self._open(method, payload, window)
        self._wire.wake()
        return Stream(self, inbound, decoder, self._cancel_from_thread)

    async def call(self, method: str, payload: object = None, *, result_type: Any = Any) -> Any:
        """A stream of exactly one item: send the request, wait for its result.

        Parameters and errors as for :meth:`open`; cancelling the call cancels the handler.

        :raises PayloadError: the handler gave no item, or more than one.
        """
        decoder = decoder_for(result_type)
        inbound = self._open(method, payload, 2)  # two, so that a second item shows itself
        if self.session.opened == 1:
            self._wire.flush()  # nobody to wait for
        else:
            self._wire.wake()
        result: Raw | Batch | None = None
        try:
            while True:
                while inbound.items:
                    if result is not None or isinstance(inbound.items[0], Batch):
                        raise PayloadError(
                            f"{self.peer} answered the call of {method!r} with more than one item; open() it"
                        )
                    result, credit_due = self.session.take(inbound)
                    if credit_due:
                        self._wire.wake()
                if inbound.outcome is not None:
                    break
                await self.wait(inbound)
        finally:
            if inbound.outcome is None:
                self.cancel(inbound)
        if not isinstance(inbound.outcome, End):
            raise ending(inbound, self.peer)
        if result is None:
            raise PayloadError(f"{self.peer} answered the call of {method!r} with no item")
        try:
            return decoder.decode(result)  # type: ignore[arg-type]  # a Raw: batches were refused
        except PayloadError as exc:
            exc.add_note(f"sent by {self.peer} on the stream of {method!r}")
            raise

    async def aclose(self) -> None:
        """End the connection: cancel every stream, let all handlers clean up, say goodbye.

        The peer's handlers have ``Limits.goodbye_timeout`` seconds for that, ours as long as they need.
        Cancelling this only stops the waiting. May be called again.
        """
        self.close_soon()
        await self.wait_closed()

    def close_soon(self, reason: str = "this side closed the connection") -> None:
        """Begin what ``aclose()`` does, without waiting."""
        self._end(reason)

    def refuse_elsewhere(self) -> None:
        """:raises MisuseError: on another event loop than the connection's, or in another thread."""
        # asyncio says at once which of its loops runs; asking anyio takes ten times as long.
        here = _asyncio_loop() if self._loop is not None else current_token()
        if here != (self._loop or self._token):
            raise MisuseError(
                f"the connection to {self.peer} was made on another event loop, the only one that can use it; connect "
                "on this one, too, or pass on what comes"
            )

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, for whatever reason, and its handlers have cleaned up."""
        await self._closed.wait()

    # For Stream and serve().

    async def wait(self, half: Inbound | Outbound) -> None:
        """Wait until something happens to a half of a stream; there may be several waiters.

        :raises MisuseError: on another event loop than the connection's, or in another thread.
        """
        self.refuse_elsewhere()
        waiters = self._waiters.setdefault(half, [])
        happened: Awaitable[None]
        wake: Callable[[], None]
        if self._loop is None:
            event = anyio.Event()
            happened, wake = event.wait(), event.set
        else:
            happened = future = self._loop.create_future()
            wake = functools.partial(_set, future)
        waiters.append(wake)
        try:
            await happened
        except BaseException:
            if wake in waiters:  # else somebody who gives up again and again on a quiet stream leaves them all here
                waiters.remove(wake)
            raise

    @property
    def congested(self) -> bool:
        """Whether so much waits to be written that handlers must not add to it."""
        return self.session.outbox.size > self.limits.send_buffer

    async def wait_for_room(self) -> None:
        """Wait until the writer has caught up."""
        while self.congested:
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    def interruptible(self, outbound: Outbound) -> Interrupt:
        """A block that is cancelled, once, when the peer cancels the stream or is lost."""
        interrupt = self._interrupts[outbound] = Interrupt()
        return interrupt

    def cancel(self, inbound: Inbound) -> None:
        """Cancel a stream that this side opened."""
        if self.session.cancel(inbound):
            self.wake_writer()
        self._wake(inbound)

    async def wait_through(self, outbound: Outbound) -> None:
        """Wait until every part of a large item is on its way, or will never be."""
        while outbound.transfer is not None:
            await self.wait(outbound)

    def finish(self, outbound: Outbound, message: End | Fail) -> None:
        """A handler has ended and cleaned up."""
        self.session.finish(outbound, message)
        self._waiters.pop(outbound, None)
        self._interrupts.pop(outbound, None)
        self._handlers.pop(outbound, None)
        if self._handlers:
            self._wire.wake()  # others may have something to say in the same turn of the loop
        else:
            self._wire.flush()

    # For the wire.

    def received(self, data: bytes) -> float | None:
        """Bytes arrived.

        :returns: None, or seconds for which the wire shall read nothing more, and then call again with nothing.
        """
        if self._discarding:
            return None
        reader, session = self._reader, self.session
        self._bytes_received += len(data)
        frames = 0
        try:
            reader.feed(data)
            while (messages := reader.next_frame()) is not None:
                effects = session.receive(messages)
                self._apply(effects)
                if effects.disturbances:
                    wait = self._budget.spend(effects.disturbances, self._now())
                    if wait:
                        return min(wait, _LONGEST_PAUSE)
                frames += 1
                if frames == _FRAMES_A_TURN:
                    return 0.0
        except ProtocolError as exc:
            log.warning("connection.protocol_broken", peer=self.peer, error=str(exc))
            # Read on to the end without looking: closing a socket with unread bytes could lose our Goodbye.
            self._discarding = True
            self._end(f"protocol error: {exc}", exc)
        return None

    def next_frame(self) -> bytes | None:
        """What to write next, or None when there is nothing to say."""
        frame = self.session.take_frame()
        for half in self.session.outbox.through:
            self._wake(half)
        return frame

    def written(self) -> None:
        """The wire took what there was, or as much as it takes now."""
        if self._room is not None and not self.congested:
            self._room.set()
            self._room = None

    def reached_end(self) -> None:
        """The peer sends nothing more."""
        self._broken = self._broken or self._reason is None
        self._end(f"{self.peer} closed the connection without a goodbye")
        self._peer_done.set()

    def broke(self, error: BaseException) -> None:
        """The wire works no more."""
        self._broken = True
        self._end(f"the connection to {self.peer} broke: {error!r}", error)
        self._peer_done.set()

    # Its own task, and what wakes others.

    async def _run(self) -> None:
        log.debug("connection.opened", peer=self.peer)
        try:
            await self._ending.wait()
            await self._handlers_ended()
            if not self._broken:
                with anyio.move_on_after(self.limits.goodbye_timeout):
                    self.session.say_goodbye(self._reason or "")
                    self._wire.finish()
                    await self._wire.wait_finished()
                    await self._peer_done.wait()
        finally:
            self._end("the connection's task was cancelled")
            with anyio.CancelScope(shield=True):
                await self._handlers_ended()
                await self._wire.aclose()
            self._closed.set()
            if self._on_closed is not None:
                self._on_closed(self)
            log.debug("connection.closed", peer=self.peer, reason=self._reason)

    def _open(self, method: str, payload: object, window: int) -> Inbound:
        self.refuse_elsewhere()
        if not 1 <= len(method) <= 512 or not 1 <= window < 2**31:
            raise MisuseError(
                f"a method has 1 to 512 characters and a window 1 to {2**31 - 1} items, "
                f"got {len(method)} characters and a window of {window}"
            )
        encoded = encode_payload(payload, f"payload of {method!r}", self.session.allowed.message_bytes)
        return self.session.open(method, encoded, window, traceparent())

    def _apply(self, effects: Effects) -> None:
        for outbound, payload in effects.started:
            self._start(outbound, payload)
        for half in effects.ready:
            self._wake(half)
        for outbound in effects.interrupted:
            # A handler whose task has not begun sees the state; one that has ended needs nothing.
            interrupt = self._interrupts.get(outbound)
            if interrupt is not None:
                interrupt.interrupt()
        if effects.goodbye is not None:
            self._end(f"{self.peer} said goodbye: {effects.goodbye}")
            self._peer_done.set()
        if self.session.talkative:
            self._wire.wake()

    def _start(self, outbound: Outbound, payload: Raw) -> None:
        name = f"{outbound.method} for {self.peer}"
        if self._loop is None:
            self._handlers[outbound] = self._runtime.start(serve, self, outbound, self._handler, payload, name=name)
            return
        # Owned by this connection, whose own task the Runtime owns and which waits for them.
        serving = serve(self, outbound, self._handler, payload)
        self._handlers[outbound] = self._loop.create_task(serving, name=name)

    async def _handlers_ended(self) -> None:
        for handler in list(self._handlers.values()):
            if isinstance(handler, asyncio.Task):
                await asyncio.wait((handler,))
            else:
                await handler.ended()

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        """Begin the end; the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._apply(self.session.close(reason, cause))
            self._ending.set()

    def _wake(self, half: Inbound | Outbound) -> None:
        for wake in self._waiters.pop(half, ()):
            wake()

    def _cancel_from_thread(self, inbound: Inbound) -> None:
        self._post(lambda: self.cancel(inbound))


async def _refuse(method: str, payload: Raw) -> AsyncIterator[object]:
    raise MisuseError(f"{method!r} was called over a connection whose other side has no handler")
    yield


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _asyncio_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _thread_safe_post() -> Callable[[Callable[[], object]], None]:
    """What runs a function in this event loop, from any thread; does nothing once the loop is closed."""
    loop: Any = current_token().native_token
    post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def post_unless_closed(fn: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # also trio.RunFinishedError
            post(fn)

    return post_unless_closed
