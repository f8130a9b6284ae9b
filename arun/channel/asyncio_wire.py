"""AsyncioWire: a socket as asyncio's transports give it, without a task, a queue or an event between.

What arrives is decoded in the transport's own callback, and what is pending is written in one callback of the event
loop. anyio's streams add a task and several wake-ups to each message, which tripled the time of a call.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import SocketAttribute

if TYPE_CHECKING:
    from arun.channel.wire import Carried
    from arun.runtime import Runtime

__all__ = ("AsyncioWire",)

# Bytes that lie unread before the handshake reads them; more are left in the kernel.
_UNREAD_BYTES = 2**14

_READ_BYTES = 2**18


class _Buffers(threading.local):
    """Where a thread's event loop reads to, whichever socket it reads: nothing lies there from one reading to the next.

    Without it asyncio allocates these bytes for every reading, and gives most of them back: 20 us that a call takes
    twice.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_READ_BYTES))


_BUFFERS = _Buffers()


class AsyncioWire(asyncio.BufferedProtocol):
    """One socket. A :class:`~arun.channel.wire.Wire`; made as the protocol of an asyncio transport."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._carried: Carried | None = None
        # Until start(): what arrived, who waits for it, how it ended.
        self._unread: deque[bytes] = deque()
        self._reading: asyncio.Future[None] | None = None
        self._end: BaseException | None = None
        # After it.
        self._scheduled = self._paused = self._finishing = False
        self._resting = False  # reads nothing, because the peer sends too much that costs work
        self._encrypted = False
        self._finished = asyncio.Event()
        self._lost = asyncio.Event()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._encrypted = transport.get_extra_info("sslcontext") is not None
        # What was given to the transport is on its way as soon as it takes more. TLS's takes high=0 for always.
        self._transport.set_write_buffer_limits(high=1 if self._encrypted else 0, low=0)
        raw = transport.get_extra_info("socket")
        if raw is not None and raw.family in {socket.AF_INET, socket.AF_INET6}:
            # asyncio does so only for sockets that it made itself.
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _BUFFERS.view

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_BUFFERS.view[:nbytes])
        if self._carried is not None:
            self._hand_over(data)
            return
        self._unread.append(data)
        if sum(map(len, self._unread)) > _UNREAD_BYTES:
            self._transport.pause_reading()
        self._wake_reader()

    def eof_received(self) -> bool:
        self._ended(anyio.EndOfStream())
        return not self._encrypted  # the other direction stays open, where there are two

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(exc or anyio.EndOfStream())
        self._finished.set()
        self._lost.set()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if self._carried is not None:
            self._write()

    # The Wire.

    async def receive(self) -> bytes:
        while not self._unread:
            if self._end is not None:
                if isinstance(self._end, anyio.EndOfStream):
                    raise anyio.EndOfStream
                raise anyio.BrokenResourceError from self._end
            self._reading = self._loop.create_future()
            await self._reading
        data = self._unread.popleft()
        if not self._unread:
            self._transport.resume_reading()
        return data

    async def send(self, data: bytes) -> None:
        if self._transport.is_closing():
            raise anyio.BrokenResourceError
        self._transport.write(data)

    def start(self, carried: Carried, runtime: Runtime, name: str) -> None:
        self._carried = carried
        self._loop.call_soon(self._start)

    def wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._write_soon)

    def flush(self) -> None:
        if self._carried is not None and not self._paused:
            self._write()

    def finish(self) -> None:
        self._finishing = True
        self.wake()

    async def wait_finished(self) -> None:
        await self._finished.wait()

    async def aclose(self) -> None:
        self._transport.abort()
        await self._lost.wait()

    def extra(self, attribute: Any, default: Any = None) -> Any:
        names = {SocketAttribute.raw_socket: "socket", SocketAttribute.remote_address: "peername"}
        return self._transport.get_extra_info(names[attribute], default)

    def _start(self) -> None:
        carried = self._carried
        assert carried is not None  # set by start
        self._hand_over(b"".join(self._unread))  # the handshake's reader may hold more
        self._unread.clear()
        if self._end is not None:
            self._tell_end(self._end)
        else:
            if not self._resting:
                self._transport.resume_reading()
            self.wake()

    def _hand_over(self, data: bytes) -> None:
        if self._carried is None or self._transport.is_closing():
            return
        pause = self._carried.received(data)
        if pause is not None:
            self._resting = True
            self._transport.pause_reading()
            self._loop.call_later(pause, self._hand_over, b"")
        elif self._resting:
            self._resting = False
            self._transport.resume_reading()

    def _write_soon(self) -> None:
        self._scheduled = False
        self._write()

    def _write(self) -> None:
        carried, transport = self._carried, self._transport
        if carried is None or transport.is_closing():
            return
        while not self._paused:
            frame = carried.next_frame()
            if frame is None:
                if self._finishing and not self._finished.is_set():
                    self._finished.set()
                    if transport.can_write_eof():
                        with suppress(OSError):  # the peer has reset it, which connection_lost will tell
                            transport.write_eof()
                break
            transport.write(frame)
        carried.written()

    def _wake_reader(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)

    def _ended(self, end: BaseException) -> None:
        if self._carried is not None:
            self._tell_end(end)
            return
        self._end = self._end or end
        self._wake_reader()

    def _tell_end(self, end: BaseException) -> None:
        assert self._carried is not None  # see the callers
        if isinstance(end, anyio.EndOfStream):
            self._carried.reached_end()
        else:
            self._carried.broke(end)
