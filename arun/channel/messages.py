"""The messages of the channel protocol: tagged msgpack arrays, ``[tag, field, ...]``.

A connection begins with one `Challenge`, one `Hello` and one `Welcome`; after that only the messages
of `SessionMessage` are legal. Fields are only ever appended, in a new protocol version, and sent
only to peers that agreed on it; `Challenge` and `Hello`, which come before the agreement, never
change. Payloads stay encoded (``msgspec.Raw``) until somebody asks for them with a type.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta, Raw, Struct

__all__ = (
    "NEWEST_VERSION",
    "OLDEST_VERSION",
    "Cancel",
    "Challenge",
    "Credit",
    "End",
    "Fail",
    "Goodbye",
    "Hello",
    "Item",
    "ItemPart",
    "Items",
    "LargeItem",
    "Open",
    "OpenPart",
    "Ping",
    "Pong",
    "SessionMessage",
    "Welcome",
)

OLDEST_VERSION = 1
NEWEST_VERSION = 1

Count: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
# 2**31 ids would last a busy connection (20,000 calls a second) for 30 hours.
StreamId: TypeAlias = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Digest: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=512)]
Text: TypeAlias = Annotated[str, Meta(max_length=65536)]
Details: TypeAlias = Annotated[bytes, Meta(max_length=16384)]
Traceparent: TypeAlias = Annotated[str, Meta(max_length=55)]


class _Message(Struct, array_like=True, forbid_unknown_fields=True, frozen=True, gc=False):
    pass


class Challenge(_Message, tag=1, frozen=True):
    """Server's first message: the nonce that the client must prove its token with."""

    nonce: Digest


class Hello(_Message, tag=2, frozen=True):
    """Client's answer: the versions it speaks, a nonce of its own, its proof, its limits."""

    oldest: Count
    newest: Count
    nonce: Digest
    proof: Digest
    streams: Count
    message_bytes: Count


class Welcome(_Message, tag=3, frozen=True):
    """The client is authenticated: the version to speak, the server's proof and limits."""

    version: Count
    proof: Digest
    streams: Count
    message_bytes: Count


class Open(_Message, tag=4, frozen=True):
    """Opener asks the peer to run ``method``; it may send so many items and bytes at first.

    ``large``: 0, or the bytes of a payload that follows in OpenParts; ``payload`` is nil then. ``traceparent``: the
    opener's place in a trace, as W3C's Trace Context writes it, or nothing.
    """

    stream: StreamId
    method: Name
    items: Count
    bytes: Count
    payload: Raw
    large: Size = 0
    traceparent: Traceparent = ""


class OpenPart(_Message, tag=16, frozen=True):
    """The next bytes of the payload that an Open announced."""

    stream: StreamId
    data: memoryview


class Item(_Message, tag=5, frozen=True):
    """Handler's next item."""

    stream: StreamId
    payload: Raw


class Items(_Message, tag=13, frozen=True):
    """Handler's next items, as one array: cheaper than so many Items, and the same in every other way."""

    stream: StreamId
    payloads: Raw


class LargeItem(_Message, tag=14, frozen=True):
    """Handler's next item has so many bytes, which follow in ItemParts."""

    stream: StreamId
    bytes: Count


class ItemPart(_Message, tag=15, frozen=True):
    """The next bytes of the item that a LargeItem announced."""

    stream: StreamId
    data: memoryview


class Credit(_Message, tag=6, frozen=True):
    """Opener has consumed: the handler may send so many more items and bytes."""

    stream: StreamId
    items: Count
    bytes: Count


class End(_Message, tag=7, frozen=True):
    """The handler is through and its clean-up done; nothing of this stream follows."""

    stream: StreamId


class Fail(_Message, tag=8, frozen=True):
    """As End, but the handler raised: the qualified name of the error's type, message, traceback.

    The details are its arguments and attributes by :mod:`arun.codec`; none where the message is all of them.
    """

    stream: StreamId
    kind: Name
    message: Text
    traceback: Text
    details: Details = b""


class Cancel(_Message, tag=9, frozen=True):
    """Opener wants no more items; the handler cleans up and answers End or Fail."""

    stream: StreamId


class Ping(_Message, tag=10, frozen=True):
    """Asks for a Pong with the same number."""

    number: Count


class Pong(_Message, tag=11, frozen=True):
    """Answers the latest Ping."""

    number: Count


class Goodbye(_Message, tag=12, frozen=True):
    """The sender's last message, sent when its own handlers have cleaned up."""

    reason: Text


SessionMessage: TypeAlias = (
    Open | OpenPart | Item | Items | LargeItem | ItemPart | Credit | End | Fail | Cancel | Ping | Pong | Goodbye
)
