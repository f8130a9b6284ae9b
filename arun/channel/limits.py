"""Limits: what one side of a connection allows its peer, and how long it waits."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

__all__ = ("Limits",)

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# Half of what a Credit can hold: it may have to give back a window and one message beyond it.
_Bytes = Annotated[int, Meta(ge=1, le=2**30 - 1)]
_Seconds = Annotated[float, Meta(gt=0)]


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of one side of a connection. Nothing that a peer can make grow is without one.

    :ivar streams: streams served to the peer at once; a cancelled stream counts until its handler
        has cleaned up. Announced to the peer, whose ``open()`` refuses to go beyond it.
    :ivar message_bytes: largest single message (an item, a payload) taken from the peer. Announced.
    :ivar window_bytes: bytes that the peer may send on a stream ahead of its consumer; one item
        may overshoot it. The window in items is an argument of ``Connection.open``.
    :ivar send_buffer: bytes waiting to be written above which local handlers wait.
    :ivar handshake_timeout: seconds a peer has to authenticate.
    :ivar half_open: connections of a server that may be unauthenticated at once; others are closed.
    :ivar goodbye_timeout: seconds that ``aclose()`` waits for the peer's handlers to clean up.
    """

    streams: _Count = 1024
    message_bytes: _Bytes = 64 * 2**20
    window_bytes: _Bytes = 4 * 2**20
    send_buffer: _Bytes = 2**20
    handshake_timeout: _Seconds = 5.0
    half_open: _Count = 64
    goodbye_timeout: _Seconds = 5.0
