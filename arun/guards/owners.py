"""Owners: which action's code runs on this thread right now, and which async generators it has begun.

The trampoline (:func:`arun.hosting.in_context`) sits an :class:`Owner` down on its thread's :class:`Seat` for every
step that it drives. Two things look at the seat: the watchdog, and the hooks that Python calls when an async generator
begins and when one is dropped unfinished (:func:`sys.set_asyncgen_hooks`). Ours stand in front of the event loop's
own while a run goes on, and leave everything to them that no action owns. What an action drops is handed to its owner,
so that it can be closed in the action's task and context; the event loop's hook would close it later, in another task.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncGenerator, Callable
from types import CodeType
from typing import Any, Final, Protocol, TypeAlias

import msgspec

from arun.guards.levels import Checks

__all__ = ("Labelled", "Named", "Owner", "Seat", "enter_run", "forget", "here", "leave_run")

_Hook: TypeAlias = Callable[[AsyncGenerator[Any, Any]], None]

#: Dropped generators that one owner keeps; with more, the oldest go to the event loop, so that a long-lived action
#: does not hoard them.
_KEPT: Final = 64


class Named(Protocol):
    """What an owner is called after: a subtask's handle, or anything else that can say what it is."""

    def label(self) -> str:
        """What a person calls it."""
        ...


class Labelled(Protocol):
    """As :class:`Named`, of an action: its context."""

    @property
    def label(self) -> str:
        """The action's name."""
        ...


class Owner(msgspec.Struct, eq=False):
    """One piece of a user's code while it is driven.

    :ivar who: names it.
    :ivar generators: ids of the async generators that it has begun.
    :ivar abandoned: those of them that it has dropped without closing them.
    :ivar unyielded: instructions that made subtasks which it has not yielded, by number.
    """

    who: Named | Labelled
    checks: Checks
    generators: set[int] | None = None
    abandoned: list[AsyncGenerator[Any, Any]] | None = None
    unyielded: dict[int, tuple[CodeType, int]] | None = None

    def label(self) -> str:
        """What a person calls this code."""
        label = self.who.label
        return f"action {label}" if isinstance(label, str) else label()


class Seat:
    """What runs on one thread."""

    __slots__ = ("owner", "runs", "steps", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        #: whose code runs; None between two steps
        self.owner: Owner | None = None
        #: counts the times that the event loop has given control to an owner
        self.steps = 0
        #: runs that have begun and not ended
        self.runs = 0


class _Here(threading.local):
    def __init__(self) -> None:
        self.seat = Seat()


here: Final = _Here()


def enter_run() -> Seat:
    """A run begins on this thread: put our hooks in front of the event loop's."""
    seat = here.seat
    seat.runs += 1
    begun, dropped = sys.get_asyncgen_hooks()
    if not isinstance(getattr(begun, "__self__", None), _Hooks):
        hooks = _Hooks(seat, begun, dropped)
        sys.set_asyncgen_hooks(hooks.begun, hooks.dropped)
    return seat


def leave_run(seat: Seat) -> None:
    """A run has ended; the last one gives the event loop's hooks back, unless somebody else has replaced ours."""
    seat.runs -= 1
    if not seat.runs and here.seat is seat:
        hooks = getattr(sys.get_asyncgen_hooks().firstiter, "__self__", None)
        if isinstance(hooks, _Hooks):
            sys.set_asyncgen_hooks(hooks.loops_begun, hooks.loops_dropped)


def forget(owner: Owner) -> None:
    """The owner has ended: what it began and somebody still holds is the event loop's from now on."""
    for number in owner.generators or ():
        if _owner_of.get(number) is owner:
            del _owner_of[number]
    owner.generators = None


#: the owner of every generator that was begun by one and has not been finalised
_owner_of: Final[dict[int, Owner]] = {}


class _Hooks:
    """Our hooks on one thread, in front of those of the event loop that runs there."""

    __slots__ = ("_seat", "loops_begun", "loops_dropped")

    def __init__(self, seat: Seat, begun: _Hook | None, dropped: _Hook | None) -> None:
        self._seat = seat
        self.loops_begun = begun
        self.loops_dropped = dropped

    def begun(self, generator: AsyncGenerator[Any, Any]) -> None:
        """A generator takes its first step."""
        owner, number = self._seat.owner, id(generator)
        if owner is None:
            # The id may have been that of a generator which has ended by itself: nobody is told of that.
            _owner_of.pop(number, None)
        else:
            _owner_of[number] = owner
            if owner.generators is None:
                owner.generators = set()
            owner.generators.add(number)
        if self.loops_begun is not None:
            self.loops_begun(generator)

    def dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Nobody refers to a suspended generator any more."""
        owner = _owner_of.pop(id(generator), None)
        # The garbage collector runs on any thread; the event loop's hook is safe to call from all of them.
        if owner is not None and owner.generators is not None and threading.get_ident() == self._seat.thread:
            owner.generators.discard(id(generator))
            if owner.abandoned is None:
                owner.abandoned = []
            owner.abandoned.append(generator)
            if len(owner.abandoned) <= _KEPT:
                return
            generator = owner.abandoned.pop(0)
        if self.loops_dropped is not None:
            self.loops_dropped(generator)
