"""What ``states``, ``actions`` and ``tasks`` give: refused at its own ``yield`` where it is of the wrong kind."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

from arun.actions import Action, as_action
from arun.errors import MisuseError, MisuseWarning
from arun.frames import line_in
from arun.guards import Checks, Owner, Yields, close_unused, shown, spelling, warn_at
from arun.hosting import as_async_iterator, close, refuse
from arun.state import State

__all__ = ("Source", "maybe_await", "not_a_task", "note_made", "refusal", "warn_of_unyielded")


def not_a_task(owner: Action, task: Any) -> str:
    said = f"{type(owner).__qualname__}.tasks yielded {shown(task)}; "
    close_unused(task)
    if isinstance(task, State):
        return said + "yield the task itself, `handle = yield SubGraphTask(...)`, and not what awaiting it gave"
    if isinstance(task, Action):
        return said + "yield SubGraphTask(graph=<the action>, state=<its State>)"
    return said + "yield SubGraphTask(graph=..., state=...)"


def refusal(candidate: Any, owner: Action, method: str) -> MisuseError | None:
    """What is wrong with something that ``states``, ``state`` or ``actions`` gave."""
    if method == "actions":
        try:
            as_action(candidate, where=f"{type(owner).__qualname__}.actions")
        except MisuseError as misuse:
            return misuse
        return None
    if isinstance(candidate, State):
        return None
    hint = spelling(candidate)
    close_unused(candidate)
    return MisuseError(
        f"{type(owner).__qualname__}.{method} gave {shown(candidate)}; {hint + '; ' if hint else ''}"
        "it gives States: yield state.update(...)"
    )


async def maybe_await(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Source:
    """What ``states`` or ``actions`` gave: ``items`` to iterate over, each of which is to be looked at.

    :ivar items: the async iterator.
    """

    __slots__ = ("_kind", "_method", "_owner", "_yields", "items")

    def __init__(self, items: AsyncIterator[Any], owner: Action, method: str, checks: Checks | None) -> None:
        self.items = items
        self._owner = owner
        self._method = method
        self._kind: type = Action if method == "actions" else State
        self._yields = Yields.of(items, checks)

    @classmethod
    async def of(cls, produced: Any, owner: Action, method: str, checks: Checks | None) -> Source:
        """:raises MisuseError: for what can't be iterated over."""
        if inspect.isawaitable(produced):
            produced = await produced
        items = None if isinstance(produced, Mapping) else await as_async_iterator(produced)
        if items is None:
            hint = spelling(produced) or f"make it a generator: async def {method}(...): yield ..."
            message = (
                f"{type(owner).__qualname__}.{method} gave {shown(produced)}, which is no iterable of {method}; {hint}"
            )
            close_unused(produced)
            raise MisuseError(message)
        return cls(items, owner, method, checks)

    def fine(self, one: Any) -> bool:
        """Whether nothing can be wrong with an item; cheap."""
        return isinstance(one, self._kind) and (self._yields is None or self._yields.fine())

    async def corrected(self, one: Any) -> Any:
        """What the source gives instead, once it has been told at its own ``yield`` what is wrong with an item.

        :raises MisuseError: unless it catches that and goes on.
        """
        yields = self._yields
        while True:
            misuse = yields.look() if yields is not None else None
            misuse = misuse or refusal(one, self._owner, self._method)
            if misuse is None:
                return one
            one = await refuse(self.items, misuse, yields)

    async def aclose(self) -> None:
        """Close the generator that it is, if it is one."""
        await close(self.items)


def note_made(owner: Owner) -> int:
    """Remember the line that makes a subtask, until it is yielded. Its number; 0 if nobody will ask."""
    made = owner.unyielded
    if made is None:
        made = owner.unyielded = {}
    if len(made) >= _MADE_AT_MOST:
        return 0
    frame = sys._getframe(2)
    number = next(_numbers)
    made[number] = frame.f_code, frame.f_lasti  # the line is looked up only if somebody asks
    return number


_numbers = itertools.count(1)
#: Made and not yielded, after which no more are noted.
_MADE_AT_MOST = 100


def warn_of_unyielded(owner: Owner) -> None:
    for code, lasti in (owner.unyielded or {}).values():
        line = line_in(code, lasti)
        told = (
            f"a SubGraphTask made in {code.co_qualname} at {code.co_filename}:{line} was never yielded, "
            "so it has not run: yield it"
        )
        warn_at(MisuseWarning(told), code.co_filename, line)
