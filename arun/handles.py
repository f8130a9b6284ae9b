"""Handle: a started subtask that can be awaited, and the check that awaiting it can't deadlock.

A subtask can't end before the subtasks below it have, nor before the handle that it awaits. Every await of a handle is
recorded as an edge while it lasts; one that would close a cycle is refused instead.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import anyio
import msgspec
from anyio.lowlevel import current_token

from arun.errors import MisuseError, SubtaskFailed, SubtaskSkipped
from arun.outcomes import Failed, Ok, Outcome, Skipped

__all__ = ("Handle", "current_handle")

T = TypeVar("T")

#: the subtask that this code runs in, the innermost one
current_handle: ContextVar[Handle[Any] | None] = ContextVar("arun_current_handle", default=None)


class Handle(msgspec.Struct, Generic[T], eq=False):
    """A started subtask. Await it for its result; ``outcome()`` never raises for the subtask's sake."""

    #: what the source yielded
    spec: Any
    #: 0, 1, 2, ... in the order in which the source yielded
    ordinal: int
    #: the subtask that the whole fan-out is a part of
    parent: Handle[Any] | None = None
    #: the event loop that it runs on
    token: object = None
    #: computes what a person calls this subtask; None calls it by its ordinal
    describe: Callable[[], str] | None = None
    #: what its failure does; None: what the policy of the fan-out says
    on_error: str | None = None
    #: attempts begun so far
    attempt: int = 0
    #: tells the idle timeout that the subtask has yielded something; None where there is no such timeout
    beat: Callable[[], None] | None = None
    #: the outcome, None while the subtask has not ended
    outcome_now: Outcome[T] | None = None
    _ended: anyio.Event | None = None
    # Made when first needed: most subtasks await no other.
    _awaiting: list[Handle[Any]] | None = None

    def __repr__(self) -> str:
        return f"<Handle {self.label()} {'running' if self.outcome_now is None else self.outcome_now!r}>"

    def __await__(self) -> Generator[Any, Any, T]:
        return self._result().__await__()

    def label(self) -> str:
        """What a person calls this subtask."""
        return f"subtask {self.ordinal}" if self.describe is None else self.describe()

    async def outcome(self) -> Outcome[T]:
        """Wait for the end and return how it ended.

        :raises MisuseError: if that could never be: the subtask waits, directly or not, for the one that asks.
        """
        if self.outcome_now is None:
            asking = current_handle.get()
            lineage = list(_lineage(asking))
            self._refuse_cycle(asking, lineage)
            if self.token is not None and current_token() != self.token:
                raise MisuseError(
                    f"{self.label()} was started on another event loop, which is the one to await it on; pass on its "
                    "result instead of its handle"
                )
            if self._ended is None:
                self._ended = anyio.Event()
            for one in lineage:
                if one._awaiting is None:
                    one._awaiting = []
                one._awaiting.append(self)
            try:
                await self._ended.wait()
            finally:
                for one in lineage:
                    if one._awaiting is not None:
                        one._awaiting.remove(self)
            assert self.outcome_now is not None
        return self.outcome_now

    def end(self, outcome: Outcome[T]) -> None:
        """Set the outcome; for the kernel."""
        self.outcome_now = outcome
        if self._ended is not None:
            self._ended.set()

    async def _result(self) -> T:
        outcome = await self.outcome()
        match outcome:
            case Ok():
                return outcome.value
            case Failed():
                raise SubtaskFailed(f"{self.label()} failed: {outcome.error!r}") from outcome.error
            case Skipped():
                raise SubtaskSkipped(f"{self.label()} did not finish: {outcome.reason}")

    def _refuse_cycle(self, asking: Handle[Any] | None, lineage: list[Handle[Any]]) -> None:
        if asking is None:
            return
        seen: set[int] = set()
        frontier: list[Handle[Any]] = [self]
        while frontier:
            handle = frontier.pop()
            if handle in lineage:
                if handle is asking and handle is self:
                    how = "which is itself"
                elif handle is self:
                    how = "which can't end before it"
                else:
                    how = f"which waits for {handle.label()}" + (
                        "" if handle is asking else ", which can't end before it"
                    )
                raise MisuseError(
                    f"deadlock: {asking.label()} awaits {self.label()}, {how}; "
                    "let the later one of two subtasks await the earlier one, never both ways"
                )
            if id(handle) not in seen:
                seen.add(id(handle))
                frontier.extend(handle._awaiting or ())


def _lineage(handle: Handle[Any] | None) -> Generator[Handle[Any]]:
    while handle is not None:
        yield handle
        handle = handle.parent
