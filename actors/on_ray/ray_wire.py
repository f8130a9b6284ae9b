"""Channels over Ray's own calls, for clusters where nothing but Ray may listen: a hundred times slower than sockets.

The same frames as everywhere go up as arguments of calls, and down as the items of a streaming generator. There is no
token: whoever has the actor's Ray handle may call it.
"""

from __future__ import annotations

import functools
import secrets
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import ByteStream
from anyio.streams.stapled import StapledObjectStream

from arun.channel import Connection, Limits
from arun.channel.halves import Allowed
from arun.channel.wire import StreamWire
from arun.errors import ChannelLost
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from anyio.streams.memory import MemoryObjectSendStream

    from arun.channel import Handler

__all__ = ("RayDoor", "connect_over_ray")

# Frames that lie in memory, in each direction, before their writer waits; what lies there goes out as one.
_PIPE_FRAMES = 8
_LIMITS = Limits()


class RayDoor:
    """The actor's side: serves a handler to every client that calls, on the event loop where the calls come in."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._up: dict[str, MemoryObjectSendStream[bytes]] = {}
        self._connections: set[Connection] = set()

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    async def down(self, wire: str) -> AsyncGenerator[bytes, None]:
        """What a streaming generator of Ray's yields: first nothing, then frames. The wire is open until it ends."""
        to_client, frames = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)
        from_client, received = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)
        connection = Connection(
            StreamWire(StapledObjectStream(to_client, received)),
            runtime=Runtime.current(),
            peer=f"ray:{wire}",
            handler=self._handler,
            limits=_LIMITS,
            allowed=Allowed(_LIMITS.streams, _LIMITS.message_bytes),
            on_closed=self._connections.discard,
        )
        self._connections.add(connection)
        self._up[wire] = from_client
        try:
            yield b""
            async for frame in frames:
                joined = [frame]
                while frames.statistics().current_buffer_used:
                    joined.append(frames.receive_nowait())
                yield b"".join(joined)
        finally:
            del self._up[wire]
            # Both ways at once: for the connection, the peer is lost, unless it has said goodbye.
            from_client.close()
            frames.close()

    async def up(self, wire: str, data: bytes) -> None:
        """What a client calls with its frames, one call after the other; with nothing at its end."""
        to_connection = self._up.get(wire)
        if to_connection is None:
            raise ChannelLost(f"the wire ray:{wire} is closed")
        if data:
            await to_connection.send(data)
        else:
            to_connection.close()

    async def aclose(self) -> None:
        """Say goodbye to every client, and wait until all handlers have cleaned up."""
        for connection in self._connections:
            connection.close_soon()
        for connection in list(self._connections):
            await connection.aclose()


async def connect_over_ray(
    down: Callable[[str], Any], up: Callable[[str, bytes], Any], *, peer: str, limits: Limits = _LIMITS
) -> Connection:
    """Connect to a :class:`RayDoor`.

    :param down: calls a method of a Ray actor that returns ``RayDoor.down(wire)``, as a streaming generator.
    :param up: calls one that awaits ``RayDoor.up(wire, data)``.
    :param peer: its name, for errors.
    :raises ChannelLost: it did not answer in time, or has ended.
    """
    wire = secrets.token_hex(8)
    stream = _Calls(down(wire), functools.partial(up, wire))
    try:
        with anyio.fail_after(limits.handshake_timeout):
            await stream.receive()
    except TimeoutError as exc:
        stream.cancel()
        raise ChannelLost(f"{peer} did not answer within {limits.handshake_timeout} s") from exc
    except (anyio.BrokenResourceError, anyio.EndOfStream) as exc:
        raise ChannelLost(f"{peer} can't be reached: {exc.__cause__ or exc!r}") from exc
    except BaseException:
        stream.cancel()
        raise
    return Connection(
        StreamWire(stream),
        runtime=Runtime.current(),
        peer=peer,
        handler=None,
        limits=limits,
        allowed=Allowed(limits.streams, limits.message_bytes),
    )


class _Calls(ByteStream):
    """The client's side: bytes that come out of a generator and go into calls."""

    def __init__(self, frames: Any, up: Callable[[bytes], Any]) -> None:
        self._frames = frames
        self._up = up

    async def receive(self, max_bytes: int = 65536) -> bytes:
        from ray.exceptions import RayError

        try:
            data: bytes = await (await anext(self._frames))
        except StopAsyncIteration:
            raise anyio.EndOfStream from None
        except RayError as exc:
            raise anyio.BrokenResourceError from exc
        return data

    async def send(self, item: bytes) -> None:
        from ray.exceptions import RayError

        try:
            await self._up(item)
        except RayError as exc:
            raise anyio.BrokenResourceError from exc

    async def send_eof(self) -> None:
        await self.send(b"")

    async def aclose(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the generator: dropping it would leave it running."""
        import ray

        ray.cancel(self._frames)
