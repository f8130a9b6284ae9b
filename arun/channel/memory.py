"""Channels inside one process: a byte pipe in memory under the same connection and codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from anyio.streams.stapled import StapledObjectStream

from arun.channel.connection import Connection
from arun.channel.limits import Limits
from arun.channel.session import Allowed

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
    to_b, from_a = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)
    to_a, from_b = anyio.create_memory_object_stream[bytes](_PIPE_FRAMES)
    allowed = Allowed(limits.streams, limits.message_bytes)
    return (
        Connection(StapledObjectStream(to_b, from_b), peer="memory", handler=handler_a, limits=limits, allowed=allowed),
        Connection(StapledObjectStream(to_a, from_a), peer="memory", handler=handler_b, limits=limits, allowed=allowed),
    )
