"""Trace context: which trace a stream is opened in, carried to its handler as W3C's ``traceparent``.

Where the program uses OpenTelemetry, the opener's current span becomes the parent of those that the handler starts, in
whatever process. Without it, the handler finds the traceparent in a context variable, and what it opens carries it on.
"""

from __future__ import annotations

import contextvars
import re
import sys
from typing import Any

__all__ = ("TRACEPARENT", "enter_trace", "traceparent")

TRACEPARENT: contextvars.ContextVar[str] = contextvars.ContextVar("arun_traceparent", default="")
"""That of the stream whose handler runs, as ``00-<trace id>-<span id>-<flags>``; nothing where there is none.

Set it, to a valid one, to begin a trace without OpenTelemetry.
"""

_VALID = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def traceparent() -> str:
    """Where in a trace this code runs, as a stream that is opened here carries it; nothing where there is no trace."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is not None:
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    value = TRACEPARENT.get()
    return value if not value or _VALID.fullmatch(value) else ""


def enter_trace(value: str) -> None:
    """Make a traceparent that arrived, or none, that of the running task, whatever it has inherited."""
    if value and not _VALID.fullmatch(value):
        value = ""
    if value == traceparent():
        return
    TRACEPARENT.set(value)
    if "opentelemetry.trace" in sys.modules:
        from opentelemetry import context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context.attach(TraceContextTextMapPropagator().extract({"traceparent": value}))
