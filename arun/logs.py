"""arun's own loggers: structlog's, with two manners of a library.

structlog is imported when there is something to write: it takes as long to import as half of arun, and an event loop
would stand still for it. And as long as the program has not configured structlog, only warnings and worse are written,
to stderr: structlog's own default would print every debug line into the program's stdout. (The standard library's
``logging.lastResort`` does the same.)
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ("discreet_processors", "get_logger")

_LOUD = frozenset({"warning", "warn", "error", "exception", "critical", "fatal"})


class _Logger:
    """Passes on to ``structlog.get_logger(name)``, asked for anew each time, so that configuring it later works."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        if method.startswith("__"):  # vLLM's workers ask every value of every module for its __dict__, and use it
            raise AttributeError(f"a logger has no {method}")
        loud = method in _LOUD
        if not loud and "structlog" not in sys.modules:  # so nobody has configured it
            return _drop
        import structlog

        if structlog.is_configured():
            return getattr(structlog.get_logger(self._name), method)
        if not loud:
            return _drop
        return getattr(
            structlog.wrap_logger(structlog.PrintLogger(sys.stderr), processors=discreet_processors()), method
        )


def get_logger(name: str) -> Any:
    """A structlog logger."""
    return _Logger(name)


def discreet_processors() -> list[Any]:
    """structlog's defaults, save that tracebacks show no local variables, which hold prompts, tokens and keys.

    structlog shows them wherever rich is installed, which Ray and vLLM bring along.
    """
    import structlog

    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer(),
        structlog.dev.set_exc_info,
        structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _drop(*args: Any, **kwargs: Any) -> None:
    """Nobody has asked for what is less than a warning."""
