"""Shared by the tests of the guard-rails: small applications, and the line of a marked statement."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

from arun import Application, ApplicationBuilder
from arun.guards import Level


def app_of(*actions: Any, check: Level = "error", **state: Any) -> Application:
    """An application of one action after the other."""
    builder = ApplicationBuilder().with_actions(*actions).with_state(**state).with_check(check)
    names = [one.display_name for one in actions]
    return builder.with_transitions(*itertools.pairwise(names)).with_entrypoint(names[0]).build()


def place(function: Callable[..., Any], marker: str = "# here") -> str:
    """``file:line`` of the marked line in a function or class."""
    lines, first = inspect.getsourcelines(function)
    (offset,) = [number for number, line in enumerate(lines) if marker in line]
    return f"{inspect.getsourcefile(function)}:{first + offset}"


def raised_at(error: BaseException) -> str:
    """``file:line`` of the innermost line of a test in an error's traceback."""
    found = ""
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if "/tests/guards/" in code.co_filename:
            found = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return found
