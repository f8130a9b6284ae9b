"""Runs the handler of one stream in the one task that drives and closes its iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Self, TypeAlias

import anyio
from anyio.lowlevel import checkpoint
from msgspec import Raw

from arun.channel.codec import encode_payload
from arun.channel.failures import describe
from arun.channel.messages import End, Fail
from arun.channel.tracing import enter_trace
from arun.errors import ArunError
from arun.logs import get_logger

if TYPE_CHECKING:
    from types import TracebackType

    from arun.channel.connection import Connection
    from arun.channel.halves import Outbound

__all__ = ("CHECKPOINT_ITEMS", "Handler", "Interrupt", "serve")

log = get_logger("arun.channel")

Handler: TypeAlias = Callable[[str, Raw], "AsyncIterator[object] | Awaitable[object]"]
"""``handler(method, payload)``: called once per Open; an async iterator, usually a generator, of items. Or an
awaitable, usually a coroutine, of the only item: what ``Connection.call`` wants, for less.

An item is anything that msgspec encodes. When the opener cancels, the iterator is interrupted if it is
waiting (on asyncio: cancelled once, so ``finally`` blocks may await; on trio: cancelled until it ends, so
they need a shield there) or closed if it has yielded. Its slot is free only when it has ended.
"""

# A handler or consumer that never has to wait lets others run after so many items.
CHECKPOINT_ITEMS = 256


class Interrupt:
    """A block that another task of the same event loop can leave by cancellation, once.

    anyio's scopes cancel every await until the block is left, which on asyncio would break clean-up
    that awaits, as in vLLM's abort or any client's ``__aexit__``. So on asyncio this is asyncio's own
    cancellation, delivered once and taken back (as ``asyncio.timeout`` does); on trio it is a scope.
    """

    __slots__ = ("_called", "_scope", "_task")

    def __init__(self) -> None:
        self._called = False
        self._task: asyncio.Task[object] | None = None
        self._scope: anyio.CancelScope | None = None

    def __enter__(self) -> Self:
        try:
            self._task = asyncio.current_task()
        except RuntimeError:  # no asyncio loop: trio
            self._scope = anyio.CancelScope()
            self._scope.__enter__()
        return self

    def interrupt(self) -> None:
        """Cancel the block, if it still runs. Call it at most once."""
        if self._scope is not None:
            self._scope.cancel()
        elif self._task is not None and not self._task.cancelling():  # else it is being cancelled for good
            self._called = True
            self._task.cancel()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        scope, task, self._scope, self._task = self._scope, self._task, None, None
        if scope is not None:
            return scope.__exit__(exc_type, exc, traceback)
        if self._called and task is not None:
            left = task.uncancel()
            return left == 0 and isinstance(exc, asyncio.CancelledError)
        return False


async def serve(connection: Connection, outbound: Outbound, handler: Handler, payload: Raw) -> None:
    """Drive the handler's iterator to its end, or close it; then tell the opener how it ended.

    Everything happens in the calling task: the iterator's steps, its ``aclose`` and its clean-up.
    """
    error: Exception | None = None
    iterator: AsyncIterator[object] | None = None
    try:
        if outbound.state == "open":  # else cancelled before this task ran
            enter_trace(outbound.traceparent)
            with connection.interruptible(outbound):
                answer = handler(outbound.method, payload)
                if isinstance(answer, Awaitable):
                    await _send_one(connection, outbound, await answer)
                else:
                    iterator = answer
                    await _send_all(connection, outbound, iterator)
    except Exception as exc:  # noqa: BLE001  # a handler may raise anything; the opener is told
        error = exc
    except BaseException as exc:
        if isinstance(exc, (SystemExit, KeyboardInterrupt)) or _cancelled_for_good(exc):
            # The event loop ends, most likely with its process: what the peer has open here is lost, it has not failed.
            connection.close_soon(f"the event loop of the handler of {outbound.method!r} is ending: {exc!r}")
        else:
            error = ArunError(f"the handler of {outbound.method!r} raised {exc!r}")
        raise
    finally:
        if iterator is not None:
            error = await _close(iterator) or error  # noqa: ASYNC102 - clean-up sees cancellation as anywhere else
        message = End(outbound.id) if error is None else describe(outbound.id, error)
        if isinstance(message, Fail):
            # An error after Cancel reaches nobody: the opener has left.
            say = log.debug if outbound.state == "open" else log.warning
            say(
                "handler.failed", peer=connection.peer, method=outbound.method, kind=message.kind, error=message.message
            )
        connection.finish(outbound, message)


def _cancelled_for_good(exc: BaseException) -> bool:
    """Whether the present task is cancelled; a handler may also raise the error of another one, which it awaited."""
    if isinstance(exc, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(exc, anyio.get_cancelled_exc_class())


async def _send_all(connection: Connection, outbound: Outbound, iterator: AsyncIterator[object]) -> None:
    session, wake, flush = connection.session, connection.wake_writer, connection.flush_writer
    send, limit, what = session.send, session.allowed.message_bytes, f"item of {outbound.method!r}"
    outbox, send_buffer = session.outbox, connection.limits.send_buffer
    streak = 0
    async for item in iterator:
        payload = encode_payload(item, what, limit)
        while not send(outbound, payload):
            if outbound.state != "open":  # closed, but the iterator went on
                return
            await connection.wait(outbound)
            streak = 0
        if outbound.run is not None and not outbound.run.left:
            flush()  # what is complete is on its way while the next is made
        else:
            wake()
        if outbound.transfer is not None:
            # What the item is made of belongs to the iterator again once it goes on.
            await connection.wait_through(outbound)
        if outbox.size > send_buffer:
            await connection.wait_for_room()
        streak += 1
        if streak >= CHECKPOINT_ITEMS:
            await checkpoint()
            streak = 0


async def _send_one(connection: Connection, outbound: Outbound, item: object) -> None:
    session = connection.session
    # A stream begins with credit for one; without it, it was cancelled.
    session.send(outbound, encode_payload(item, f"result of {outbound.method!r}", session.allowed.message_bytes))
    if outbound.transfer is not None:
        connection.wake_writer()
        await connection.wait_through(outbound)


async def _close(iterator: AsyncIterator[object]) -> Exception | None:
    """Close the iterator, if it can be closed and has not ended by itself; return its error."""
    aclose = getattr(iterator, "aclose", None)
    if aclose is None or getattr(iterator, "ag_frame", iterator) is None:
        return None
    try:
        # The stream's slot, and whoever waits for the clean-up, depend on this being awaited.
        with anyio.CancelScope(shield=True):
            await aclose()
    except Exception as exc:  # noqa: BLE001  # reported by the caller
        return exc
    return None
