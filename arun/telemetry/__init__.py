"""Logging for programs: libraries never configure structlog, applications may with one call."""

from __future__ import annotations

from arun.telemetry.logging import configure_logging, configure_logging_as_parent

__all__ = ("configure_logging", "configure_logging_as_parent")
