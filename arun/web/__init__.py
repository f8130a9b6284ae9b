"""arun in ASGI services (Starlette, FastAPI, Litestar): runs as server-sent events, and as long as their request."""

from __future__ import annotations

import importlib.util

from arun.errors import MissingExtraError

if importlib.util.find_spec("starlette") is None:
    raise MissingExtraError("arun.web", extra="web", package="starlette")

from arun.web.disconnect import cancel_on_disconnect
from arun.web.event_stream import EventStream
from arun.web.sse import encode_event

__all__ = ("EventStream", "cancel_on_disconnect", "encode_event")
