"""Frames: a 4-byte big-endian length, then one msgpack array of messages.

`Outbox` collects encoded messages and packs whatever is pending into a frame, so that coalescing
costs no latency; `FrameReader` takes bytes as they arrive and gives back messages. Neither does I/O.

A frame of several messages is held to `FRAME_MESSAGES` and `FRAME_BYTES`, which bound the time that
decoding it can block the event loop; a message alone in its frame may be large, up to the limit
that its receiver announced.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec
from msgspec.msgpack import Decoder, Encoder

from arun.errors import PayloadError, ProtocolError

__all__ = (
    "FRAME_BYTES",
    "FRAME_MESSAGES",
    "FrameReader",
    "Outbox",
    "decode_payload",
    "decoder_for",
    "encode_message",
    "encode_payload",
    "largest_frame",
)

FRAME_MESSAGES = 4096
FRAME_BYTES = 2**20

_LENGTH_BYTES = 4
# At most: of the array that a frame is, and of a message around its payload (Open with its method).
_HEADER_BYTES = 5
_ENVELOPE_BYTES = 4096
_ENCODER = Encoder()
# What msgspec raises for bytes that it refuses; the last two are no MsgspecError.
_REFUSED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)

M = TypeVar("M")

encode_message = _ENCODER.encode


class Outbox:
    """Encoded messages that wait for the writer, packed into frames when it asks.

    :ivar size: bytes waiting.
    :ivar appended: messages ever appended.
    :ivar taken: messages ever packed into a frame.
    """

    __slots__ = ("_messages", "appended", "size", "taken")

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self.size = 0
        self.appended = 0
        self.taken = 0

    def append(self, message: bytes) -> None:
        """Add one encoded message."""
        self._messages.append(message)
        self.size += len(message)
        self.appended += 1

    def take_frame(self) -> bytes | None:
        """Pack what is pending, up to the limits of one frame; None when nothing is."""
        pending = self._messages
        if not pending:
            return None
        if len(pending) <= FRAME_MESSAGES and self.size <= FRAME_BYTES:
            messages = list(pending)
            pending.clear()
            body = self.size
        else:
            messages = [pending.popleft()]
            body = len(messages[0])
            while pending and len(messages) < FRAME_MESSAGES and body + len(pending[0]) <= FRAME_BYTES:
                body += len(pending[0])
                messages.append(pending.popleft())
        self.size -= body
        self.taken += len(messages)
        header = _array_header(len(messages))
        return b"".join(((body + len(header)).to_bytes(_LENGTH_BYTES, "big"), header, *messages))


class FrameReader(Generic[M]):
    """Turns a peer's bytes into messages of the expected types, and anything else into ProtocolError.

    :param peer: the peer's name, for errors.
    :param expected: the message type, or union of types, that is legal now.
    :param frame_bytes: largest frame that is legal, see `largest_frame`.
    """

    __slots__ = ("_buffer", "_decoder", "_frame_bytes", "_need", "_peer")

    def __init__(self, peer: str, expected: Any, frame_bytes: int) -> None:
        self._peer = peer
        self._buffer = bytearray()
        self._need = _LENGTH_BYTES
        self._decoder: Decoder[list[M]] = decoder_for(list[expected])
        self._frame_bytes = frame_bytes

    def switch(self, expected: Any, frame_bytes: int) -> FrameReader[Any]:
        """A reader of other messages that goes on with the bytes that this one has not used."""
        reader: FrameReader[Any] = FrameReader(self._peer, expected, frame_bytes)
        reader.feed(self._buffer)
        return reader

    def feed(self, data: bytes | bytearray) -> None:
        """Take bytes that arrived."""
        self._buffer += data

    def next_frame(self) -> list[M] | None:
        """The messages of the next complete frame, or None while it is incomplete.

        :raises ProtocolError: the frame is too large, malformed, or holds an unexpected message.
            The reader can't be used after that.
        """
        buffer = self._buffer
        if len(buffer) < self._need:
            return None
        if self._need == _LENGTH_BYTES:
            length = int.from_bytes(buffer[:_LENGTH_BYTES], "big")
            self._check_length(length)
            self._need += length
            if len(buffer) < self._need:
                return None
        with memoryview(buffer) as view:
            body = bytes(view[_LENGTH_BYTES : self._need])
        del buffer[: self._need]
        self._need = _LENGTH_BYTES
        return self._decode(body)

    def _check_length(self, length: int) -> None:
        if not 2 <= length <= self._frame_bytes:
            raise ProtocolError(f"{self._peer} sent a frame of {length} bytes; 2 to {self._frame_bytes} are legal here")

    def _decode(self, body: bytes) -> list[M]:
        count = _array_count(body)
        if not 1 <= count <= FRAME_MESSAGES:
            raise ProtocolError(f"{self._peer} sent a frame of {count} messages; 1 to {FRAME_MESSAGES} are legal")
        if count > 1 and len(body) > FRAME_BYTES + _HEADER_BYTES:
            raise ProtocolError(
                f"{self._peer} sent {count} messages in one frame of {len(body)} bytes; "
                f"a frame of several messages has at most {FRAME_BYTES}"
            )
        try:
            return self._decoder.decode(body)
        except _REFUSED as exc:
            raise ProtocolError(f"{self._peer} sent a frame of {len(body)} bytes that is not valid: {exc}") from exc


def largest_frame(message_bytes: int) -> int:
    """Bytes of a frame with one message whose payload has so many bytes."""
    return message_bytes + _ENVELOPE_BYTES


def encode_payload(value: object, what: str, limit: int) -> bytes:
    """Encode a value that a user wants to send.

    :param what: what the value is, for the error, as in "item of 'watch'".
    :param limit: bytes that the receiver takes.
    :raises PayloadError: msgspec can't encode it, or it is too large.
    """
    try:
        payload = _ENCODER.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise PayloadError(
            f"{what} of type {type(value).__qualname__} can't be sent over a channel: {exc}. Send what msgspec "
            "encodes: Structs, dataclasses, dicts, lists, str, bytes, numbers up to 64 bits, datetimes"
        ) from exc
    if len(payload) > limit:
        raise PayloadError(
            f"{what} of type {type(value).__qualname__} has {len(payload)} bytes, the peer takes {limit}; "
            "raise Limits(message_bytes=...) there, or send it in pieces"
        )
    return payload


def decode_payload(decoder: Decoder[M], payload: msgspec.Raw, what: str) -> M:
    """Decode a payload that arrived.

    :raises PayloadError: it is not of the decoder's type.
    """
    try:
        return decoder.decode(payload)
    except _REFUSED as exc:
        raise PayloadError(f"{what} is not of the declared type {decoder.type!r}: {exc}") from exc


def decoder_for(wanted: Any) -> Decoder[Any]:
    """The decoder of a type, cached.

    :raises PayloadError: msgspec can't decode into that type.
    """
    try:
        return _cached_decoder(wanted)
    except TypeError as exc:
        raise PayloadError(f"nothing that arrives over a channel can become a {wanted!r}: {exc}") from exc


@functools.lru_cache(maxsize=256)
def _cached_decoder(wanted: Any) -> Decoder[Any]:
    return Decoder(wanted)


def _array_header(count: int) -> bytes:
    return bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


def _array_count(body: bytes) -> int:
    """Number of elements that a msgpack array says it has; 0 if it is no array."""
    first = body[0]
    if first & 0xF0 == 0x90:
        return first & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(first, 0)
    return int.from_bytes(body[1 : 1 + width], "big")
