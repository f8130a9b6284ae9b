"""Limits: what one side of a connection allows its peer, and how long it waits."""

from __future__ import annotations

from msgspec import Struct

from arun.errors import MisuseError

__all__ = ("Budget", "Limits")


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds of one side of a connection. Nothing that a peer can make grow is without one.

    :ivar streams: streams served to the peer at once; a cancelled stream counts until its handler
        has cleaned up. Announced to the peer, whose ``open()`` refuses to go beyond it.
    :ivar disturbances: Cancels of running handlers, and Pings, that are taken from the peer in a second; a peer that
        sends more is read more slowly. As many as ``streams`` may come at once.
    :ivar message_bytes: largest payload (of a request or an item) taken from the peer, at least 1 MiB.
        Announced to the peer, which refuses to send a larger one.
    :ivar window_bytes: bytes that the peer may send on a stream ahead of its consumer; one item
        may overshoot it. The window in items is an argument of ``Connection.open``.
    :ivar send_buffer: bytes waiting to be written above which local handlers wait.
    :ivar handshake_timeout: seconds that connecting and authenticating may take.
    :ivar half_open: connections of a server that may be unauthenticated at once; others are closed.
    :ivar silence: seconds, at least 1, after which a peer over TCP is lost whose machine does not answer any more, or
        which takes nothing of what is sent to it. The kernel answers, so a process may be busy for longer.
    :ivar goodbye_timeout: seconds that ``aclose()`` waits for the peer's handlers to clean up.
    :raises MisuseError: a value is out of its range.
    """

    streams: int = 1024
    disturbances: int = 200
    message_bytes: int = 64 * 2**20
    window_bytes: int = 4 * 2**20
    send_buffer: int = 2**20
    handshake_timeout: float = 5.0
    half_open: int = 64
    silence: float = 30.0
    goodbye_timeout: float = 5.0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise MisuseError(f"Limits({name}={value!r}) is out of its range, {low} to {high}")


_RANGES: dict[str, tuple[float, float]] = {
    "streams": (1, 2**31 - 1),
    "disturbances": (1, 2**31 - 1),
    # At least a frame of coalesced messages. At most so much that a Credit, 31 bits, can give back a
    # window and the message that overshot it.
    "message_bytes": (2**20, 2**30 - 1),
    "window_bytes": (1, 2**30 - 1),
    "send_buffer": (1, 2**30 - 1),
    "handshake_timeout": (0.0, float("inf")),
    "half_open": (1, 2**31 - 1),
    "silence": (1.0, 86_400.0),
    "goodbye_timeout": (0.0, float("inf")),
}


class Budget:
    """What a peer may cost without moving data: a starting sum that refills with time. No clock of its own.

    Opening streams only to cancel them (HTTP/2's rapid reset), or asking for Pongs, keeps this side busy at next to no
    cost for the peer. Limits on what is open at once do not help: each is gone at once. So it has to wait.

    :param rate: units a second.
    :param burst: units that it may spend at once.
    """

    __slots__ = ("_burst", "_left", "_rate", "_seen")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._seen = now

    def spend(self, units: int, now: float) -> float:
        """Take units, into debt if need be.

        :returns: seconds until there is no debt.
        """
        self._left = min(self._burst, self._left + (now - self._seen) * self._rate) - units
        self._seen = now
        return max(0.0, -self._left / self._rate)
