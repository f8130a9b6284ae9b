"""Hooks: functions that are told of a run's events before anybody else is.

They cascade: what happens in subtasks and sub-graphs, wherever those run, is told as well, in the process and on the
event loop of the run itself. A run with hooks tells one event at a time, in the order of the events' numbers: each is
built when it has happened (and is in the store, where there is one), goes through the hooks in the order in which they
were registered, and then to the stream, if somebody reads one. So a slow hook holds up the run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import copy_context
from typing import Any, Final, get_args

import anyio

from arun.errors import MisuseError
from arun.events import Event, RunCancelled, RunFailed
from arun.hosting import in_context
from arun.logs import get_logger

__all__ = ("Hook", "Hooks", "hook")

log = get_logger("arun.hooks")

_KINDS: Final[tuple[type, ...]] = get_args(Event)
#: After these a run has nothing left to fail.
_TOO_LATE: Final = (RunFailed, RunCancelled)


class Hook:
    """A function and the kinds of events that it is told of; made by :func:`hook`. Calling it calls the function."""

    __slots__ = ("__wrapped__", "failures", "kinds", "name", "required", "timeout")

    def __init__(
        self, function: Callable[[Any], Any], kinds: frozenset[type], *, required: bool, timeout: float
    ) -> None:
        self.__wrapped__ = function
        self.name: str = getattr(function, "__qualname__", repr(function))
        self.kinds = kinds
        self.required = required
        self.timeout = timeout
        #: how often it has raised or was too slow, over all runs
        self.failures = 0

    def __repr__(self) -> str:
        return f"<Hook {self.name} of {', '.join(sorted(kind.__name__ for kind in self.kinds))}>"

    def __call__(self, event: Any) -> Any:
        return self.__wrapped__(event)

    async def tell(self, event: Event) -> None:
        """Call it with an event, in a context of its own.

        :raises Exception: what it raised, or TimeoutError, if it is required.
        """
        try:
            with anyio.move_on_after(self.timeout) as scope:
                await in_context(copy_context(), self._call(event))
            if anyio.current_time() >= scope.deadline:
                raise TimeoutError(f"hook {self.name} took longer than its timeout of {self.timeout:g} s")
        except Exception as exc:
            self.failures += 1
            kind = type(event).__name__
            log.warning("hook.failed", hook=self.name, on=kind, error=repr(exc), failures=self.failures)
            if self.required and not isinstance(event, _TOO_LATE):
                exc.add_note(f"in hook {self.name}, told of {kind}")
                raise

    async def _call(self, event: Event) -> None:
        told = self.__wrapped__(event)
        if inspect.isawaitable(told):
            await told


def hook(*kinds: Any, required: bool = False, timeout: float = 5.0) -> Callable[[Callable[[Any], Any]], Hook]:
    """Make a :class:`Hook` of a function of one argument, the event, for ``ApplicationBuilder.with_hooks``.

    A plain function is called on the event loop, so it must neither wait nor compute for long; an ``async def`` is
    awaited.

    :param kinds: the types of events that it is told of; ``arun.Event`` is all of them.
    :param required: True lets its error fail the action or the run that the event tells of. By default, an error is
        logged as ``hook.failed`` and counted in ``failures``. What has failed or was cancelled anyway stays that.
    :param timeout: seconds; taking longer is a TimeoutError of the hook.
    :raises MisuseError: for what is no type of event, and for a function that yields, or that can't be called with the
        event alone.

    >>> @hook(SubtaskFinished)
    ... async def count(event: SubtaskFinished) -> None:
    ...     await metrics.add(event.seconds)
    """
    chosen: set[type] = set()
    for kind in kinds:
        members: tuple[Any, ...] = get_args(kind) or (kind,)
        for member in members:
            if member not in _KINDS:
                raise MisuseError(
                    f"hook({member!r}): it takes types of events: {', '.join(known.__name__ for known in _KINDS)}"
                )
            chosen.add(member)
    if not chosen:
        raise MisuseError("hook() names no type of event; @hook(ActionFinished) for one, @hook(arun.Event) for all")
    if not timeout > 0:
        raise MisuseError(f"hook(timeout={timeout!r}): it is a number of seconds above 0")

    def decorate(function: Callable[[Any], Any]) -> Hook:
        if not callable(function) or inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise MisuseError(f"@hook on {function!r}: it takes a function, plain or `async def`, that yields nothing")
        _refuse_other_parameters(function)
        return Hook(function, frozenset(chosen), required=required, timeout=timeout)

    return decorate


def _refuse_other_parameters(function: Callable[[Any], Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a builtin, which tells none
        return
    try:
        signature.bind(None)
    except TypeError:
        raise MisuseError(
            f"@hook on {function!r}: it is called with the event alone, and takes {signature}; of a method, decorate "
            "the bound one: hook(...)(self.method)"
        ) from None


class Hooks:
    """The hooks of an application, by the kind of event."""

    __slots__ = ("_by_kind",)

    def __init__(self, hooks: Iterable[Hook]) -> None:
        self._by_kind: dict[object, list[Hook]] = {}
        for one in hooks:
            for kind in one.kinds:
                self._by_kind.setdefault(kind, []).append(one)

    def __contains__(self, kind: object) -> bool:
        return kind in self._by_kind

    async def tell(self, event: Event) -> None:
        """Tell those that are registered for its kind, one after the other."""
        for one in self._by_kind.get(type(event), ()):
            await one.tell(event)
