"""Check levels: what happens when a guard-rail finds a mistake that the program could survive.

==========  ====================================================================================================
level       a mistake
==========  ====================================================================================================
``off``     is not looked for
``warn``    is a :class:`arun.errors.MisuseWarning` at the user's own line, and the program goes on
``error``   is a :class:`arun.errors.MisuseError` (the default, and what the figures are measured with)
``strict``  as ``error``, and what takes copies to find is looked for, too: values changed in place
==========  ====================================================================================================

A mistake after which nothing sensible can happen (an action that returns no State, a deadlock) is an error always.
"""

from __future__ import annotations

import os
import warnings
from contextvars import ContextVar
from typing import Any, Final, Literal, cast, get_args

import msgspec

from arun.errors import MisuseError, MisuseWarning

__all__ = (
    "BLOCKED_AFTER",
    "Checks",
    "Level",
    "checks_here",
    "checks_of",
    "default_level",
    "inherited_checks",
    "misuse",
    "set_default_level",
    "warn_at",
)

Level = Literal["off", "warn", "error", "strict"]

#: Seconds that an action may hold the event loop before the watchdog names it.
BLOCKED_AFTER: Final = 0.1


class Checks(msgspec.Struct, frozen=True):
    """What is looked for; None in its place looks for nothing.

    :ivar level: "warn", "error" or "strict".
    :ivar blocked_after: seconds that an action may hold the event loop.
    """

    level: Level
    blocked_after: float = BLOCKED_AFTER

    @property
    def strict(self) -> bool:
        """Whether to look for what takes copies to find."""
        return self.level == "strict"


def checks_of(level: Level, blocked_after: float = BLOCKED_AFTER) -> Checks | None:
    """The checks of a level; None for "off".

    :raises MisuseError: for a level that there is not.
    """
    _refuse_unknown(level, "check")
    if blocked_after <= 0:
        raise MisuseError(f"blocked_after={blocked_after}: it is a number of seconds above 0")
    return None if level == "off" else Checks(level, blocked_after)


def default_level() -> Level:
    """The level where none is given: that of the environment variable ``ARUN_CHECK``, else "error"."""
    level = _default[0] or os.environ.get("ARUN_CHECK") or "error"
    _refuse_unknown(level, "ARUN_CHECK")
    return cast("Level", level)


def set_default_level(level: Level | None) -> Level | None:
    """Replace the default level of this process, for a test run; None takes that back. Returns what it replaces."""
    if level is not None:
        _refuse_unknown(level, "check")
    before, _default[0] = _default[0], level
    return before


def misuse(checks: Checks, message: str, filename: str, line: int) -> MisuseError | None:
    """The error to raise; at level "warn" None, and the warning has been given."""
    if checks.level == "warn":
        warn_at(MisuseWarning(message), filename, line)
        return None
    return MisuseError(message)


def warn_at(warning: Warning, filename: str, line: int) -> None:
    """Warn as if the given line had."""
    warnings.warn_explicit(warning, type(warning), filename, line, registry=_warned)


def inherited_checks() -> Checks | None:
    """The checks of the run that this code is part of, else those of the default level."""
    checks = checks_here.get()
    return checks_of(default_level()) if isinstance(checks, msgspec.UnsetType) else checks


#: the checks of the run that this code is part of
checks_here: Final[ContextVar[Checks | msgspec.UnsetType | None]] = ContextVar("arun_checks", default=msgspec.UNSET)
_default: list[Level | None] = [None]
# Which warnings were given, so that a line in a loop warns once (unless a filter says otherwise).
_warned: dict[Any, Any] = {}


def _refuse_unknown(level: str, what: str) -> None:
    if level not in get_args(Level):
        raise MisuseError(f"{what}={level!r}: the levels are {', '.join(map(repr, get_args(Level)))}")
