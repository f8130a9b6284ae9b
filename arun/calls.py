"""Calls: a user's function of any kind, called or driven to its end, and what it returned."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeAlias, cast

from arun.collectors import Collector, ItemsOnly
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.guards import Owner, close_unused, shown, spelling
from arun.hosted import drive_hosted
from arun.hosting import drive
from arun.signatures import Kind, where
from arun.state import State
from arun.threads import run_in_thread, step_in_thread

__all__ = ("Performed", "call", "in_thread", "performed", "state_of")

#: A result, and the new State.
Performed: TypeAlias = "tuple[Any, State]"


async def state_of(
    function: Callable[..., Any],
    kind: Kind,
    name: str,
    state: State,
    kwargs: Mapping[str, Any],
    context: ApplicationContext,
    *,
    hosted: bool,
) -> Performed:
    """Call a function that gives a State, or yields some; what else it yields is sent as items."""
    collector = Collector(name, context, function)
    returned = await call(function, kind, state, kwargs, collector, hosted=hosted)
    return collector.performed() if kind in {"async generator", "generator"} else performed(returned, name, function)


async def call(
    function: Callable[..., Any],
    kind: Kind,
    state: State,
    kwargs: Mapping[str, Any],
    collector: Collector | ItemsOnly,
    *,
    hosted: bool,
) -> Any:
    """Call a function of any kind; of a generator, feed the collector and return its result."""
    if kind == "coroutine":
        return await function(state, **kwargs)
    context = collector.context
    if kind == "function":
        return await in_thread(function, state, kwargs, context)
    if kind == "async generator":
        owner = Owner(context, context.checks) if context.checks is not None else None
        host = drive_hosted if hosted else drive
        await host(cast("AsyncIterator[Any]", function(state, **kwargs)), collector.take, None, owner)
        return collector.result

    iterate = functools.partial(function, state, **kwargs)
    await step_in_thread(iterate, collector.take, label=context.label, threads=context.threads)
    return collector.result


def in_thread(
    function: Callable[..., Any], state: State, kwargs: Mapping[str, Any], context: ApplicationContext
) -> Coroutine[Any, Any, Any]:
    """Call a plain function in a worker thread."""
    return run_in_thread(functools.partial(function, state, **kwargs), label=context.label, threads=context.threads)


def performed(returned: Any, name: str, function: Callable[..., Any]) -> Performed:
    """What an action's function returned, as a result and a State.

    :raises MisuseError: for anything else, with what to write instead.
    """
    if isinstance(returned, State):
        return None, returned
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], State):
        return cast("Performed", returned)
    hint = spelling(returned)
    message = (
        f"action {name!r} returned {shown(returned)}; {hint + '; ' if hint else ''}"
        f"an action returns or yields a State: return state.update(...), or (result, state) ({where(function)})"
    )
    close_unused(returned)
    raise MisuseError(message)
