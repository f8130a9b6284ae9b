"""One run, several readers: whoever needs more asks for it, for all of them.

No task of its own drives the run. A reader that finds nothing for itself takes the next turn, or waits for the end of
the turn that another one has taken; cancelled, it leaves the turn to the next. So the run goes exactly as fast as its
fastest reader, and stands still when nobody reads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import anyio
import anyio.lowlevel
import pyarrow as pa

from arun.errors import MisuseError

__all__ = ("Blocks", "Turns")


class Blocks(Protocol):
    """A stream of blocks that can be left, such as :class:`~arun.data.BlockStream`."""

    def __aiter__(self) -> AsyncIterator[pa.RecordBatch]: ...

    async def __anext__(self) -> pa.RecordBatch: ...

    async def aclose(self) -> None:
        """Leave."""


class Turns:
    """Turns of asking a stream for its next block.

    :param open: begins the stream, with the first turn.
    :param take: is given each block, and None at the end.
    :ivar ended: whether the stream has ended, or failed.
    """

    def __init__(self, open: Callable[[], Blocks], take: Callable[[pa.RecordBatch | None], Awaitable[None]]) -> None:
        self.ended = False
        self._open = open
        self._take = take
        self._stream: Blocks | None = None
        self._token: object = None
        self._turn: anyio.Event | None = None
        self._error: Exception | None = None

    @property
    def taken(self) -> bool:
        """Whether somebody asks the stream now."""
        return self._turn is not None

    def check_loop(self) -> None:
        """:raises MisuseError: the stream was begun on another event loop."""
        if self._token not in {None, anyio.lowlevel.current_token()}:
            raise MisuseError(
                "this run was started on another event loop, by another reader of it; read them all on one event loop"
            )

    async def take_one(self) -> None:
        """Return once the stream has given another block, or has ended, or when who asked for it was cancelled.

        :raises Exception: the stream's own error, to every reader.
        :raises MisuseError: the stream was begun on another event loop.
        """
        self.check_loop()
        if self._error is not None:
            raise self._error
        if self._turn is not None:
            await self._turn.wait()
            return
        self._token = anyio.lowlevel.current_token()
        self._turn = turn = anyio.Event()
        try:
            if self._stream is None:
                self._stream = self._open()
            block = await anext(self._stream, None)
            # It would be lost to all readers if this one were cancelled now.
            with anyio.CancelScope(shield=True):
                self.ended = block is None
                await self._take(block)
        except Exception as exc:
            self._error, self.ended = exc, True
            raise
        finally:
            self._turn = None
            turn.set()

    async def aclose(self) -> None:
        """End the run. Nobody may read any more."""
        self.ended = True
        if self._stream is not None:
            await self._stream.aclose()
