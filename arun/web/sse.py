"""Server-sent events: one Event as bytes on the wire (WHATWG HTML, 9.2)."""

from __future__ import annotations

from typing import Any

import msgspec

from arun.errors import ArunError
from arun.events import Event

__all__ = ("PING", "encode_error", "encode_event")

#: A comment line, which keeps proxies from closing a quiet connection.
PING = b": ping\n\n"


def encode_event(event: Event) -> bytes:
    """``id:`` is the event's number in its run, ``event:`` its type, ``data:`` all of it as one line of JSON.

    :raises ArunError: if it carries a value that has no JSON form, naming the value's type.
    """
    data = _encoder.encode(event)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, type(event).__name__.encode(), data)


def encode_error(error: str) -> bytes:
    """An ``event: error`` with ``{"error": ...}``."""
    return b"event: error\ndata: %s\n\n" % _encoder.encode({"error": error})


def _refuse(value: Any) -> Any:
    raise ArunError(
        f"a {type(value).__qualname__} has no JSON form, so it can't be sent as a server-sent event; keep such values "
        "out of the State fields and items that are streamed, or stream only some events with EventStream(only=...)"
    )


_encoder = msgspec.json.Encoder(enc_hook=_refuse)
