"""What to write instead, for a value of the wrong kind.

The messages follow trio's (``trio/_util.py``): what you gave, what that is, and the line that you want.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

__all__ = ("close_unused", "shown", "spelling")


def shown(value: object) -> str:
    """Kind and value, short: ``an async generator, <async_generator object pages at 0x...>``."""
    if value is None:
        return "None"
    kind = _kind(value)
    return f"{kind}, {value!r:.80}"


def spelling(value: object) -> str:
    """What was probably meant, as the end of a sentence; "" where there is no telling."""
    name = getattr(value, "__name__", None) or getattr(type(value), "__name__", "it")
    if inspect.iscoroutine(value):
        return f"await it: `await {name}(...)`"
    if inspect.isasyncgen(value):
        return f"iterate over it: `async for item in {name}(...):`, and yield from there"
    if inspect.isgenerator(value):
        return f"iterate over it: `for item in {name}(...):`, and yield from there"
    if inspect.isasyncgenfunction(value) or inspect.isgeneratorfunction(value) or inspect.isroutine(value):
        return f"call it, with parentheses: `{name}(...)`"
    if isinstance(value, type):
        return f"make one, with parentheses: `{name}(...)`"
    if isinstance(value, Awaitable):
        return "await it"
    return ""


def close_unused(value: object) -> None:
    """Close a coroutine that nobody will await, so that Python doesn't complain about it, far from the cause."""
    if inspect.iscoroutine(value):
        value.close()


def _kind(value: Any) -> str:
    if inspect.iscoroutine(value):
        return "a coroutine (an async def that was called and not awaited)"
    if inspect.isasyncgen(value):
        return "an async generator"
    if inspect.isgenerator(value):
        return "a generator"
    if inspect.isasyncgenfunction(value):
        return "an async generator function that was not called"
    if inspect.isroutine(value) or isinstance(value, functools.partial):
        return "a function that was not called"
    if isinstance(value, type):
        return "a class"
    if isinstance(value, AsyncIterator):
        return f"an async iterator ({type(value).__name__})"
    if isinstance(value, Iterator):
        return f"an iterator ({type(value).__name__})"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
