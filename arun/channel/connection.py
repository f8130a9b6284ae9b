"""Connection: the async shell around a session core: one reader, one writer, a task per handler."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.lowlevel import current_token

from arun.channel.codec import FrameReader, decoder_for, encode_payload, largest_frame
from arun.channel.limits import Budget
from arun.channel.messages import End, Fail, SessionMessage
from arun.channel.serving import Handler, Interrupt, serve
from arun.channel.session import Allowed, Effects, Inbound, Outbound, Session
from arun.channel.stream import Stream
from arun.errors import MisuseError, PayloadError, ProtocolError
from arun.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

    from anyio.abc import AnyByteStream
    from msgspec import Raw

    from arun.channel.limits import Limits
    from arun.runtime import Background, Runtime

__all__ = ("Connection",)

log = get_logger("arun.channel")

# Seconds for which a peer that is over its budget is not read at a time.
_LONGEST_PAUSE = 1.0


class Connection:
    """One authenticated connection over which either side opens any number of typed streams.

    Made by ``connect_tcp``, ``connect_unix``, ``memory_pair`` or a :class:`~arun.channel.Server`. Its
    tasks belong to the current Runtime, so it is bound to no frame; end it with ``aclose()``.

    :ivar peer: the peer's name, such as ``127.0.0.1:4711``, ``unix:/run/a.sock`` or ``memory``.
    """

    def __init__(
        self,
        stream: AnyByteStream,
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
        self._stream = stream
        self._handler = handler or _refuse
        self._limits = limits
        self._reader = reader or FrameReader(peer, SessionMessage, largest_frame(limits.message_bytes))
        self._on_closed = on_closed
        self._waiters: dict[Inbound | Outbound, anyio.Event] = {}
        self._interrupts: dict[Outbound, Interrupt] = {}
        self._handlers: dict[Outbound, Background[None]] = {}
        self._writer_idle: anyio.Event | None = None
        self._room: anyio.Event | None = None
        self._reason: str | None = None
        self._broken = False
        self._finishing = False
        self._ending = anyio.Event()
        self._closed = anyio.Event()
        self._post = _thread_safe_post()
        self._runtime = runtime
        runtime.start(self._run, name=f"channel to {peer}")

    def __repr__(self) -> str:
        return f"<Connection to {self.peer}, {'open' if self._reason is None else self._reason}>"

    @property
    def closed(self) -> bool:
        """Whether the connection has ended or is ending: ``open`` would raise ChannelLost."""
        return self._reason is not None

    def open(self, method: str, payload: object = None, *, item_type: Any = Any, window: int = 256) -> Stream[Any]:
        """Start a run of the peer's handler and return its items as they come.

        The request is queued at once; nothing needs to be awaited for it to be sent.

        :param method: what the peer's handler is asked for, 1 to 512 characters.
        :param payload: anything that msgspec encodes; encoded here.
        :param item_type: the type that each item is decoded into; Any gives msgspec's builtins.
        :param window: items that may lie unread here before the peer's handler has to wait.
        :raises PayloadError: the payload can't be encoded or is too large, or nothing can be decoded
            into item_type.
        :raises StreamRefused: the peer's streams are all taken.
        :raises ChannelLost: the connection has ended.
        """
        if not 1 <= len(method) <= 512 or not 1 <= window < 2**31:
            raise MisuseError(
                f"a method has 1 to 512 characters and a window 1 to {2**31 - 1} items, "
                f"got {len(method)} characters and a window of {window}"
            )
        decoder = decoder_for(item_type)
        encoded = encode_payload(payload, f"payload of {method!r}", self.session.allowed.message_bytes)
        inbound = self.session.open(method, encoded, window)
        self.wake_writer()
        return Stream(self, inbound, decoder, self._cancel_from_thread)

    async def call(self, method: str, payload: object = None, *, result_type: Any = Any) -> Any:
        """A stream of exactly one item: send the request, wait for its result.

        Parameters and errors as for :meth:`open`; cancelling the call cancels the handler.

        :raises PayloadError: the handler gave no item, or more than one.
        """
        stream = self.open(method, payload, item_type=result_type, window=1)
        try:
            result = await anext(stream)
            async for _ in stream:
                raise PayloadError(f"{self.peer} answered the call of {method!r} with more than one item; open() it")
        except StopAsyncIteration:
            raise PayloadError(f"{self.peer} answered the call of {method!r} with no item") from None
        finally:
            stream.cancel()
        return result

    async def aclose(self) -> None:
        """End the connection: cancel every stream, let all handlers clean up, say goodbye.

        The peer's handlers have ``Limits.goodbye_timeout`` seconds for that, ours as long as they need.
        Cancelling this only stops the waiting. May be called again.
        """
        self.close_soon()
        await self.wait_closed()

    def close_soon(self) -> None:
        """Begin what ``aclose()`` does, without waiting."""
        self._end("this side closed the connection")

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, for whatever reason, and its handlers have cleaned up."""
        await self._closed.wait()

    # For Stream and serve().

    async def wait(self, half: Inbound | Outbound) -> None:
        """Wait until something happens to a half of a stream; there may be several waiters."""
        event = self._waiters.get(half)
        if event is None:
            event = self._waiters[half] = anyio.Event()
        await event.wait()

    def wake_writer(self) -> None:
        """There is something to write. Whatever else is pending when the writer runs goes along."""
        if self._writer_idle is not None:
            self._writer_idle.set()
            self._writer_idle = None

    @property
    def congested(self) -> bool:
        """Whether so much waits to be written that handlers must not add to it."""
        return self.session.outbox.size > self._limits.send_buffer

    async def wait_for_room(self) -> None:
        """Wait until the writer has caught up."""
        while self.congested:
            if self._room is None:
                self._room = anyio.Event()
            await self._room.wait()

    @contextmanager
    def interruptible(self, outbound: Outbound) -> Generator[None]:
        """A block that is cancelled, once, when the peer cancels the stream or is lost."""
        with Interrupt() as interrupt:
            self._interrupts[outbound] = interrupt
            try:
                yield
            finally:
                del self._interrupts[outbound]

    def cancel(self, inbound: Inbound) -> None:
        """Cancel a stream that this side opened."""
        if self.session.cancel(inbound):
            self.wake_writer()
        self._wake(inbound)

    def finish(self, outbound: Outbound, message: End | Fail) -> None:
        """A handler has ended and cleaned up."""
        self.session.finish(outbound, message)
        self._waiters.pop(outbound, None)
        self._handlers.pop(outbound, None)
        self.wake_writer()

    # The connection's own tasks.

    async def _run(self) -> None:
        log.debug("connection.opened", peer=self.peer)
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._read)
                tasks.start_soon(self._write)
                await self._ending.wait()
                await self._handlers_ended()
                if self._broken:
                    tasks.cancel_scope.cancel()
                else:
                    # Reader and writer now end when both sides have said goodbye, or at the deadline.
                    tasks.cancel_scope.deadline = anyio.current_time() + self._limits.goodbye_timeout
                    self.session.say_goodbye(self._reason or "")
                    self._finishing = True
                    self.wake_writer()
        finally:
            self._end("the connection's task was cancelled")
            with anyio.CancelScope(shield=True):
                await self._handlers_ended()
                await self._stream.aclose()
            self._closed.set()
            if self._on_closed is not None:
                self._on_closed(self)
            log.debug("connection.closed", peer=self.peer, reason=self._reason)

    async def _read(self) -> None:
        limits = self._limits
        budget = Budget(limits.disturbances, limits.streams, anyio.current_time())
        try:
            while True:
                disturbances = 0
                while (messages := self._reader.next_frame()) is not None:
                    effects = self.session.receive(messages)
                    disturbances += effects.disturbances
                    self._apply(effects)
                if disturbances and (wait := budget.spend(disturbances, anyio.current_time())):
                    # Not longer at a time, so that it still learns soon of a Goodbye.
                    await anyio.sleep(min(wait, _LONGEST_PAUSE))
                self._reader.feed(await self._stream.receive())
        except ProtocolError as exc:
            log.warning("connection.protocol_broken", peer=self.peer, error=str(exc))
            self._end(f"protocol error: {exc}", exc)
            await self._discard()
        except anyio.EndOfStream:
            self._broken = self._reason is None
            self._end(f"{self.peer} closed the connection without a goodbye")
        except (anyio.BrokenResourceError, OSError) as exc:
            self._broken = True
            self._end(f"the connection to {self.peer} broke: {exc.__cause__ or exc!r}", exc)

    async def _discard(self) -> None:
        """Read to the end without looking: closing a socket with unread bytes could lose our Goodbye."""
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, OSError):
            while True:
                await self._stream.receive()

    async def _write(self) -> None:
        try:
            while True:
                frame = self.session.take_frame()
                if frame is not None:
                    await self._stream.send(frame)
                elif self._finishing:
                    await self._stream.send_eof()
                    return
                else:
                    self._writer_idle = anyio.Event()
                    await self._writer_idle.wait()
                if self._room is not None and not self.congested:
                    self._room.set()
                    self._room = None
        except (anyio.BrokenResourceError, OSError) as exc:
            self._broken = True
            self._end(f"the connection to {self.peer} broke: {exc.__cause__ or exc!r}", exc)

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
        if self.session.talkative:
            self.wake_writer()

    def _start(self, outbound: Outbound, payload: Raw) -> None:
        name = f"{outbound.method} for {self.peer}"
        self._handlers[outbound] = self._runtime.start(serve, self, outbound, self._handler, payload, name=name)

    async def _handlers_ended(self) -> None:
        for handler in list(self._handlers.values()):
            await handler.wait()

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        """Begin the end; the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._apply(self.session.close(reason, cause))
            self._ending.set()

    def _wake(self, half: Inbound | Outbound) -> None:
        event = self._waiters.pop(half, None)
        if event is not None:
            event.set()

    def _cancel_from_thread(self, inbound: Inbound) -> None:
        self._post(lambda: self.cancel(inbound))


async def _refuse(method: str, payload: Raw) -> AsyncIterator[object]:
    raise MisuseError(f"{method!r} was called over a connection whose other side has no handler")
    yield


def _thread_safe_post() -> Callable[[Callable[[], object]], None]:
    """What runs a function in this event loop, from any thread; does nothing once the loop is closed."""
    loop: Any = current_token().native_token
    post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def post_unless_closed(fn: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # also trio.RunFinishedError
            post(fn)

    return post_unless_closed
