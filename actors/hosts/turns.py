"""Turns: how many messages an actor takes at a time, in order of arrival."""

from __future__ import annotations

from collections import deque

import anyio

__all__ = ("Turns",)


class Turns:
    """A fair semaphore whose free turns cost neither an await nor a task switch: an item of a stream takes one each.

    :ivar free: turns that nobody has; above 0 only while nobody waits.
    """

    __slots__ = ("_waiting", "concurrency", "free")

    def __init__(self, concurrency: int) -> None:
        self.concurrency = concurrency
        self.free = concurrency
        self._waiting: deque[anyio.Event] = deque()

    @property
    def running(self) -> int:
        """Turns that are taken."""
        return self.concurrency - self.free

    @property
    def waiting(self) -> int:
        """How many wait for one."""
        return len(self._waiting)

    def take(self) -> bool:
        """Take a turn, if one is free."""
        if self.free:
            self.free -= 1
            return True
        return False

    async def wait(self) -> None:
        """Take a turn, waiting until all who came before have had theirs."""
        if self.take():
            return
        given = anyio.Event()
        self._waiting.append(given)
        try:
            await given.wait()
        except BaseException:
            if given.is_set():  # it was handed over while the cancellation was under way
                self.release()
            else:
                self._waiting.remove(given)
            raise

    def release(self) -> None:
        """Give a turn back, to the one who has waited longest."""
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self.free += 1
