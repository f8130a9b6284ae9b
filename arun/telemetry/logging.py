"""structlog for an application and the processes that it starts: one level, one place, stderr."""

from __future__ import annotations

import logging
import os
import sys

from arun.logs import discreet_processors

__all__ = ("configure_logging", "configure_logging_as_parent")

_VARIABLE = "ARUN_LOG"


def configure_logging(level: str = "info") -> None:
    """Log what is at least ``level`` to stderr, here and in the actor and worker processes started from now on.

    :param level: "debug", "info", "warning" or "error"; the environment variable ``ARUN_LOG`` goes before it.
    :raises ValueError: for another word.
    """
    level = os.environ.get(_VARIABLE, level).lower()
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"ARUN_LOG={level!r}: takes debug, info, warning or error")
    os.environ[_VARIABLE] = level
    # Not at the top: actor processes import this module, and only those of a program that logs need the other.
    import structlog

    structlog.configure(
        processors=None if structlog.is_configured() else discreet_processors(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def configure_logging_as_parent() -> None:
    """In a process that arun has started: log as the process above it, if that was configured."""
    if _VARIABLE in os.environ:
        configure_logging()
