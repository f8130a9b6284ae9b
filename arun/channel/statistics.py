"""What connections and streams tell about themselves."""

from __future__ import annotations

from msgspec import Struct

__all__ = ("ConnectionStatistics", "StreamStatistics")


class ConnectionStatistics(Struct, frozen=True, kw_only=True):
    """A connection since it was authenticated, as :meth:`Connection.statistics` finds it.

    :ivar bytes_sent: handed to the transport, before TLS.
    :ivar bytes_received: from the transport, after TLS.
    :ivar frames_sent: each carries what was pending; items_sent / frames_sent tells how well items coalesce.
    :ivar items_sent: of streams that this side serves.
    :ivar items_received: of streams that this side opened, late ones apart.
    :ivar late_items: that came for a stream after its cancellation and were dropped.
    :ivar streams_opened: by this side, ever.
    :ivar streams_served: to the peer, ever.
    :ivar streams_refused: that this side would have opened beyond the peer's limit.
    :ivar open_streams: opened by this side and not ended.
    :ivar served_streams: of the peer's, not ended; handlers that clean up included.
    :ivar without_credit: of those, the ones that may send nothing before their consumer has taken something.
    :ivar waiting_bytes: encoded and not handed to the transport; handlers wait above ``Limits.send_buffer``.
    """

    bytes_sent: int
    bytes_received: int
    frames_sent: int
    frames_received: int
    items_sent: int
    items_received: int
    late_items: int
    streams_opened: int
    streams_served: int
    streams_refused: int
    open_streams: int
    served_streams: int
    without_credit: int
    waiting_bytes: int


class StreamStatistics(Struct, frozen=True, kw_only=True):
    """A stream at its opener, as :meth:`Stream.statistics` finds it.

    :ivar items_received: so far.
    :ivar unread_items: of those, what lies here for the consumer to take.
    :ivar unread_bytes: what they have, encoded; without those that are decoded already.
    :ivar credit_items: that the handler may still send, as far as this side has granted it.
    :ivar credit_bytes: as above; one item may overshoot it.
    """

    items_received: int
    unread_items: int
    unread_bytes: int
    credit_items: int
    credit_bytes: int
