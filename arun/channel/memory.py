"""Channels inside one process: a byte pipe in memory under the same connection and codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio.streams.stapled import StapledObjectStream

from arun.channel.connection import Connection
from arun.channel.halves import Allowed
from arun.channel.limits import Limits
from arun.channel.wire import StreamWire
from arun.runtime import Runtime

if TYPE_CHECKING:
    from arun.channel.serving import Handler

__all__ = ("memory_pair",)

_DEFAULT_LIMITS = Limits()
# Frames in the pipe; like a socket's buffer, it lets both sides run without waiting for each other.
_PIPE_FRAMES = 8


def memory_pair(
    *, handler_a: Handler | None = None, handler_b: Handler | None = None, limits: Limits = _DEFAULT_LIMITS
) -> tuple[Connection, Connection]:
    """Two connected ends. Values are encoded and decoded as on a socket, so types behave the same.

    :param handler_a: serves, at the first end, what the second opens.
    :param handler_b: serves, at the second end, what the first opens.
    :param limits: of both ends.
    """
    runtime = Runtime.current()  # refused here, before there are streams to close
    to_b, from_a = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)
    to_a, from_b = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)

    def end(pipe: StapledObjectStream[bytes], handler: Handler | None) -> Connection:
        allowed = Allowed(limits.streams, limits.message_bytes)
        return Connection(
            StreamWire(pipe), runtime=runtime, peer="memory", handler=handler, limits=limits, allowed=allowed
        )

    return end(StapledObjectStream(to_b, from_b), handler_a), end(StapledObjectStream(to_a, from_a), handler_b)
