"""Wires: what carries a connection's bytes. Here for anyio's byte streams, in ``asyncio_wire`` without them.

A wire moves bytes and decides nothing: it hands what arrives to the connection, and asks it for frames when there is
something to write. All of a connection's other code is the same over every wire.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    from anyio.abc import AnyByteStream

    from arun.runtime import Background, Runtime

__all__ = ("Carried", "StreamWire", "Wire")


class Carried(Protocol):
    """The connection, as its wire sees it. Nothing here waits, and nothing raises."""

    def received(self, data: bytes) -> float | None:
        """Bytes arrived.

        :returns: None, or seconds for which the wire shall read nothing more, and then call this again with nothing.
        """

    def next_frame(self) -> bytes | None:
        """What to write next, or None when there is nothing to say for now."""

    def written(self) -> None:
        """Everything so far has been written, or as much as the wire takes."""

    def reached_end(self) -> None:
        """The peer will send nothing more."""

    def broke(self, error: BaseException) -> None:
        """Neither direction works any more."""


class Wire(Protocol):
    """Bytes both ways. After the handshake, which uses ``receive`` and ``send``, it is started and pushes."""

    async def receive(self) -> bytes:
        """Bytes that arrived, before ``start``.

        :raises anyio.EndOfStream, anyio.BrokenResourceError: the peer went away.
        """
        ...

    async def send(self, data: bytes) -> None:
        """Write, before ``start``; errors as for ``receive``."""
        ...

    def start(self, carried: Carried, runtime: Runtime, name: str) -> None:
        """From now on everything goes to and comes from this connection."""

    def wake(self) -> None:
        """The connection has something to write. Whatever else it has by the time of writing goes along."""

    def flush(self) -> None:
        """As ``wake``, and at once if that can be done without waiting."""

    def finish(self) -> None:
        """The connection's next None from ``next_frame`` is its last: end this direction then."""

    async def wait_finished(self) -> None:
        """Wait until all is written after ``finish``, or the wire is broken."""
        ...

    async def aclose(self) -> None:
        """Free everything at once; what is not written is lost."""
        ...

    def extra(self, attribute: Any, default: Any = None) -> Any:
        """A property of the transport, such as ``SocketAttribute.raw_socket``."""


class StreamWire:
    """Any anyio byte stream: sockets on trio, TLS on trio, pipes in memory, frames over Ray. One reader, one writer."""

    def __init__(self, stream: AnyByteStream) -> None:
        self._stream = stream
        self._works: list[Background[None]] = []
        self._idle: anyio.Event | None = None
        self._finishing = False
        self._finished = anyio.Event()

    def extra(self, attribute: Any, default: Any = None) -> Any:
        return self._stream.extra(attribute, default)

    async def receive(self) -> bytes:
        return await self._stream.receive()

    async def send(self, data: bytes) -> None:
        await self._stream.send(data)

    def start(self, carried: Carried, runtime: Runtime, name: str) -> None:
        self._works = [
            runtime.start(self._read, carried, name=f"reader of {name}"),
            runtime.start(self._write, carried, name=f"writer of {name}"),
        ]

    def wake(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None

    flush = wake

    def finish(self) -> None:
        self._finishing = True
        self.wake()

    async def wait_finished(self) -> None:
        await self._finished.wait()

    async def aclose(self) -> None:
        for work in self._works:
            work.cancel()
        for work in self._works:
            await work.ended()
        await anyio.aclose_forcefully(self._stream)

    async def _read(self, carried: Carried) -> None:
        try:
            while True:
                pause = carried.received(await self._stream.receive())
                while pause is not None:
                    await anyio.sleep(pause)
                    pause = carried.received(b"")
        except anyio.EndOfStream:
            carried.reached_end()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
            carried.broke(exc.__cause__ or exc)

    async def _write(self, carried: Carried) -> None:
        try:
            while True:  # noqa: ASYNC913 - each branch but the last waits
                frame = carried.next_frame()
                if frame is not None:
                    await self._stream.send(frame)
                    carried.written()
                elif self._finishing:
                    with suppress(NotImplementedError):  # TLS has no half-closed state
                        await self._stream.send_eof()
                    return
                else:
                    self._idle = anyio.Event()
                    await self._idle.wait()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as exc:
            carried.broke(exc.__cause__ or exc)
        finally:
            self._finished.set()
