"""Stream: the opener's end of one stream, an async iterator of decoded items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from anyio.lowlevel import checkpoint

from arun.channel.failures import rebuild
from arun.channel.halves import Batch, Inbound, Lost
from arun.channel.messages import Fail
from arun.channel.serving import CHECKPOINT_ITEMS
from arun.channel.statistics import StreamStatistics
from arun.errors import PayloadError
from arun.timed import Timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from arun.channel.codec import PayloadDecoder
    from arun.channel.connection import Connection

__all__ = ("Stream", "ending")

T = TypeVar("T")


class Stream(Generic[T]):
    """Items of one run of the peer's handler, in order. Made by ``Connection.open``.

    Iterate it with ``async for``; leave it early with ``aclose()`` (``contextlib.aclosing`` does so). A
    Stream that is garbage-collected while open is cancelled, from whichever thread that happens in.
    """

    __slots__ = (
        "_batch",
        "_cancel_from_thread",
        "_closed",
        "_connection",
        "_decoded",
        "_decoder",
        "_inbound",
        "_streak",
        "_undecodable",
    )

    def __init__(
        self,
        connection: Connection,
        inbound: Inbound,
        decoder: PayloadDecoder[T],
        cancel_from_thread: Callable[[Inbound], object],
    ) -> None:
        self._connection = connection
        self._inbound = inbound
        self._decoder = decoder
        self._cancel_from_thread = cancel_from_thread
        self._closed = False
        self._streak = 0
        # The batch that is being consumed; its items, newest first; and the error that comes after them.
        self._batch: Batch | None = None
        self._decoded: list[T] = []
        self._undecodable: PayloadError | None = None

    def __repr__(self) -> str:
        return f"<Stream {self._inbound.method!r} from {self._connection.peer}, {self._inbound.state}>"

    def __aiter__(self) -> Stream[T]:
        return self

    async def __anext__(self) -> T:
        """The next item. Cancelling it while it waits loses nothing.

        :raises StopAsyncIteration: the handler is through, or this Stream was closed.
        :raises ChannelLost: the connection ended; items that arrived before come first.
        :raises PayloadError: the item is not of the declared type; the stream is cancelled.
        :raises Exception: the handler's error, as itself if registered, else as RemoteError.
        """
        # The checkpoint comes before an item is taken, so that cancellation there loses none.
        self._streak += 1
        if self._streak >= CHECKPOINT_ITEMS:
            self._streak = 0
            await checkpoint()
        while True:  # noqa: ASYNC913 - waits where nothing is there
            if self._decoded:
                if len(self._decoded) == 1 and self._batch is not None:
                    self._consumed(self._batch.count, self._batch.size)
                return self._decoded.pop()
            if self._undecodable is not None:
                raise self._refuse(self._undecodable)
            inbound = self._inbound
            while not inbound.items:
                if self._closed:
                    raise StopAsyncIteration
                if inbound.outcome is not None:
                    raise ending(inbound, self._connection.peer)
                self._streak = 0
                await self._connection.wait(inbound)
            entry = inbound.items.popleft()
            if isinstance(entry, Batch):
                self._batch = entry
                self._decoded, self._undecodable = self._decoder.decode_many(entry.payloads)
                self._decoded.reverse()
                continue
            self._consumed(1, len(entry))
            try:
                return self._decoder.decode(entry)
            except PayloadError as exc:
                raise self._refuse(exc) from exc.__cause__

    def with_timeout(self, seconds: float) -> Timed[T]:
        """The same items, each with a time limit.

        :param seconds: until the next item has come; after that a TimeoutError is raised, and the stream goes on.
        """
        return Timed(self, seconds)

    def statistics(self) -> StreamStatistics:
        """What has come so far, what of it is unread, and how much more may come."""
        inbound = self._inbound
        unread = [(it.count, it.size) if isinstance(it, Batch) else (1, len(it)) for it in inbound.items]
        return StreamStatistics(
            items_received=inbound.received,
            unread_items=len(self._decoded) + sum(count for count, _ in unread),
            unread_bytes=sum(size for _, size in unread),
            credit_items=inbound.items_left,
            credit_bytes=max(0, inbound.bytes_left),
        )

    def cancel(self) -> None:
        """Tell the peer to close its handler, without waiting for that. Unread items are dropped."""
        if not self._closed:
            self._closed = True
            self._decoded.clear()
            self._undecodable = None
            self._connection.cancel(self._inbound)

    async def aclose(self) -> None:
        """Cancel the stream, and wait until the peer's handler has cleaned up or the connection is lost.

        How the handler ended is not reported here: its side logs a failing clean-up.
        """
        self.cancel()
        while self._inbound.outcome is None:
            await self._connection.wait(self._inbound)

    def _consumed(self, items: int, size: int) -> None:
        if self._connection.session.consumed(self._inbound, items, size):
            self._connection.wake_writer()

    def _refuse(self, error: PayloadError) -> PayloadError:
        error.add_note(f"sent by {self._connection.peer} on the stream of {self._inbound.method!r}")
        self.cancel()
        return error

    def __del__(self) -> None:
        if self._inbound.outcome is None and not self._closed:
            self._cancel_from_thread(self._inbound)


def ending(inbound: Inbound, peer: str) -> Exception:
    """What the end of a stream raises."""
    match inbound.outcome:
        case Fail() as fail:
            return rebuild(fail, peer, inbound.method)
        case Lost() as lost:
            return lost.error()
        case _:
            return StopAsyncIteration()
