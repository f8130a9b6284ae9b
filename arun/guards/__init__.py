"""The guard-rails: mistakes that are silent elsewhere are refused here, at the user's own line.

docs/concepts/guard-rails.md has the table. This package has what the rest of the runtime asks at a few, cheap points:

* :mod:`~arun.guards.levels`: how severely;
* :mod:`~arun.guards.static`: what a function's source tells, where it is declared;
* :mod:`~arun.guards.scopes`: which scopes a generator holds at a yield;
* :mod:`~arun.guards.owners`: which action runs, and which generators it has dropped;
* :mod:`~arun.guards.watchdog`: who holds the event loop;
* :mod:`~arun.guards.mutation`: values changed in place, at level "strict";
* :mod:`~arun.guards.kinds`: what to write instead of a value of the wrong kind.
"""

from __future__ import annotations

from arun.guards.kinds import close_unused, shown, spelling
from arun.guards.levels import (
    BLOCKED_AFTER,
    Checks,
    Level,
    checks_here,
    checks_of,
    default_level,
    inherited_checks,
    misuse,
    set_default_level,
    warn_at,
)
from arun.guards.mutation import Repeats, Watched
from arun.guards.owners import Named, Owner, Seat, forget, here
from arun.guards.scopes import Yields, holds_scope
from arun.guards.static import check_function, check_methods
from arun.guards.watchdog import begin_run, end_run

__all__ = (
    "BLOCKED_AFTER",
    "Checks",
    "Level",
    "Named",
    "Owner",
    "Repeats",
    "Seat",
    "Watched",
    "Yields",
    "begin_run",
    "check_function",
    "check_methods",
    "checks_here",
    "checks_of",
    "close_unused",
    "default_level",
    "end_run",
    "forget",
    "here",
    "holds_scope",
    "inherited_checks",
    "misuse",
    "set_default_level",
    "shown",
    "spelling",
    "warn_at",
)
