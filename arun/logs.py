"""Loggers that import structlog when something is first logged: it takes half as long to import as all of arun."""

from __future__ import annotations

from typing import Any

__all__ = ("get_logger",)


class _Logger:
    """Passes everything to ``structlog.get_logger(name)``, asked for anew each time, so that configuring it works."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, method: str) -> Any:
        import structlog

        return getattr(structlog.get_logger(self._name), method)


def get_logger(name: str) -> Any:
    """A structlog logger."""
    return _Logger(name)
