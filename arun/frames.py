"""Frames: where users' code stands, and what a suspended generator holds.

All of arun's looking into frames is here, save for the offset of an instruction, which hot paths read by themselves.
What a suspended frame holds is public on CPython: every open ``with`` keeps its bound ``__exit__`` on the stack,
and :func:`gc.get_referents` lists that.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import AsyncGeneratorType, BuiltinMethodType, CodeType, FrameType, MethodType
from typing import Any

__all__ = ("held", "innermost_user_frame", "line_at", "line_in", "line_of", "user_line")

_OWN = str(Path(__file__).parent) + os.sep
# The standard library's own folder; users' programs may live below its parents.
_LIBRARY = str(Path(os.__file__).parent) + os.sep


def user_line(awaitable: Any) -> str:
    """``function at file:line`` of the innermost frame below ``awaitable`` that is not arun's nor a library's own."""
    found = ""
    for frame in _frames(awaitable):
        if _is_users(frame):
            found = line_of(frame)
    return found or "an unknown line"


def line_of(suspended: Any) -> str:
    """``function at file:line`` of a frame, or of a suspended generator of either kind; "" if it has none."""
    frame = suspended if isinstance(suspended, FrameType) else _frame(suspended)
    return f"{frame.f_code.co_qualname} at {frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""


def line_at(generator: AsyncGeneratorType[Any, Any]) -> int:
    """The line at which an async generator is suspended."""
    frame = generator.ag_frame
    return frame.f_lineno if frame is not None else generator.ag_code.co_firstlineno


def line_in(code: CodeType, lasti: int) -> int:
    """The line of an instruction; 0 if it has none."""
    return next((line for start, end, line in code.co_lines() if start <= lasti < end and line is not None), 0)


def held(suspended: object) -> Iterator[object]:
    """The context managers that a suspended generator has open, and the async generators that it is iterating over."""
    for referent in gc.get_referents(suspended):
        kind = type(referent)
        if kind in {MethodType, BuiltinMethodType}:
            if referent.__name__ in {"__exit__", "__aexit__"}:
                yield referent.__self__
        elif kind is AsyncGeneratorType and referent.ag_frame is not None and not referent.ag_running:
            yield referent


def innermost_user_frame(frame: FrameType) -> FrameType:
    """The frame nearest to ``frame``, itself or a caller, that is neither arun's nor a library's."""
    found: FrameType | None = frame
    while found is not None:
        if _is_users(found):
            return found
        found = found.f_back
    return frame


def _is_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith((_OWN, _LIBRARY, "<frozen")) and "site-packages" not in name


def _frame(suspended: Any) -> FrameType | None:
    for attribute in ("cr_frame", "ag_frame", "gi_frame"):
        frame = getattr(suspended, attribute, None)
        if frame is not None:
            return frame  # type: ignore[no-any-return]  # by CPython's documentation
    return None


def _frames(awaitable: Any) -> Iterator[FrameType]:
    """The frames of what is being awaited, outermost first."""
    while awaitable is not None:
        frame = _frame(awaitable)
        if frame is None:
            # The awaitable of an async generator's step: the generator is all that it refers to.
            inner = [one for one in gc.get_referents(awaitable) if hasattr(one, "ag_frame")]
            awaitable = inner[0] if inner else None
            continue
        yield frame
        if "driven_coroutine" in frame.f_code.co_varnames:  # hosting.in_context, which does not `yield from`
            awaitable = frame.f_locals["driven_coroutine"]
        else:
            awaitable = next(
                (
                    getattr(awaitable, attribute)
                    for attribute in ("cr_await", "ag_await", "gi_yieldfrom")
                    if getattr(awaitable, attribute, None) is not None
                ),
                None,
            )
