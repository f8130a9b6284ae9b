"""Where users' code stands: the line at which a coroutine or generator is suspended."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ("innermost_user_frame", "line_of", "user_line")

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
