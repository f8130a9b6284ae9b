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

from arun.channel.messages import Item, Items
from arun.errors import PayloadError, ProtocolError

__all__ = (
    "FRAME_BYTES",
    "FRAME_MESSAGES",
    "FrameReader",
    "Outbox",
    "PayloadDecoder",
    "Run",
    "array_head",
    "decoder_for",
    "encode_message",
    "encode_payload",
    "item_prefix",
    "largest_frame",
)

FRAME_MESSAGES = 4096
FRAME_BYTES = 2**20

_LENGTH_BYTES = 4
# At most: of the array that a frame is, and of a message around its payload (Open with its method).
_HEADER_BYTES = 5
# A run of items stays well below a frame, so that others go along.
_RUN_BYTES = 2**16
_ENVELOPE_BYTES = 4096
_ENCODER = Encoder()
# What msgspec raises for bytes that it refuses; the last two are no MsgspecError.
_REFUSED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)

M = TypeVar("M")

encode_message = _ENCODER.encode


class Run:
    """Items of one stream that wait for the writer; they become one message.

    :ivar payloads: the encoded items, in order.
    :ivar size: bytes that it has in a frame, at most.
    :ivar taken: whether it went into a frame, so that the stream's next item needs another Run.
    """

    __slots__ = ("_prefix", "payloads", "size", "taken")

    def __init__(self, prefix: bytes) -> None:
        self._prefix = prefix
        self.payloads: list[bytes] = []
        self.size = len(prefix) + _HEADER_BYTES
        self.taken = False

    def add_to(self, parts: list[bytes]) -> None:
        """Add the bytes of the message: an Item, or Items if there are several."""
        self.taken = True
        if len(self.payloads) == 1:
            parts.append(self._prefix)
        else:
            parts.append(_ITEMS_HEAD + self._prefix[len(_ITEMS_HEAD) :] + _array_header(len(self.payloads)))
        parts += self.payloads


class Outbox:
    """Encoded messages that wait for the writer, packed into frames when it asks.

    :ivar size: bytes waiting, and at most a few more for each run of items.
    :ivar appended: messages ever appended.
    :ivar taken: messages ever packed into a frame.
    """

    __slots__ = ("_messages", "appended", "size", "taken")

    def __init__(self) -> None:
        self._messages: deque[bytes | Run] = deque()
        self.size = 0
        self.appended = 0
        self.taken = 0

    def append(self, message: bytes) -> None:
        """Add one encoded message."""
        self._messages.append(message)
        self.size += len(message)
        self.appended += 1

    def append_item(self, payload: bytes, prefix: bytes, run: Run | None, most: int) -> Run:
        """Add an encoded item of a stream to its last run, or to a new one if that is full or gone.

        :param prefix: of the stream's Items, see :func:`item_prefix`.
        :param run: what the stream's last item was added to.
        :param most: items of one run.
        :returns: the run that it was added to.
        """
        size = len(payload)
        if run is None or run.taken or len(run.payloads) >= most or run.size + size > _RUN_BYTES:
            run = Run(prefix)
            self._messages.append(run)
            self.size += run.size
            self.appended += 1
        run.payloads.append(payload)
        run.size += size
        self.size += size
        return run

    def take_frame(self) -> bytes | None:
        """Pack what is pending, up to the limits of one frame; None when nothing is."""
        pending = self._messages
        if not pending:
            return None
        parts: list[bytes] = [b"", b""]
        count = held = 0
        while pending and count < FRAME_MESSAGES:
            message = pending[0]
            size = message.size if type(message) is Run else len(message)  # type: ignore[arg-type]  # bytes, else
            if count and held + size > FRAME_BYTES:
                break
            del pending[0]
            held += size
            count += 1
            if type(message) is Run:
                message.add_to(parts)
            else:
                parts.append(message)  # type: ignore[arg-type]  # bytes, else
        self.size -= held
        self.taken += count
        parts[1] = _array_header(count)
        parts[0] = sum(map(len, parts)).to_bytes(_LENGTH_BYTES, "big")
        return b"".join(parts)


class FrameReader(Generic[M]):
    """Turns a peer's bytes into messages of the expected types, and anything else into ProtocolError.

    :param peer: the peer's name, for errors.
    :param expected: the message type, or union of types, that is legal now.
    :param frame_bytes: largest frame that is legal, see `largest_frame`.
    """

    __slots__ = ("_at", "_data", "_decoder", "_frame_bytes", "_need", "_peer")

    def __init__(self, peer: str, expected: Any, frame_bytes: int) -> None:
        self._peer = peer
        # A frame that came in one piece is decoded where it lies; the bytearray collects one that did not. Messages
        # are views of either, so nothing is ever removed from or added to it afterwards.
        self._data: bytes | bytearray = b""
        self._at = 0
        self._need = _LENGTH_BYTES
        self._decoder: Decoder[list[M]] = _frame_decoder(expected)
        self._frame_bytes = frame_bytes

    def switch(self, expected: Any, frame_bytes: int) -> FrameReader[Any]:
        """A reader of other messages that goes on with the bytes that this one has not used."""
        reader: FrameReader[Any] = FrameReader(self._peer, expected, frame_bytes)
        reader.feed(bytes(self._data[self._at :]))
        return reader

    @property
    def held(self) -> int:
        """Bytes that arrived and belong to no complete frame yet."""
        return len(self._data) - self._at

    def feed(self, data: bytes | bytearray) -> None:
        """Take bytes that arrived. They must not change afterwards."""
        if self._at == len(self._data):
            self._data, self._at = data, 0
            return
        if self._at or not isinstance(self._data, bytearray):
            self._data, self._at = bytearray(memoryview(self._data)[self._at :]), 0
        self._data += data

    def next_frame(self) -> list[M] | None:
        """The messages of the next complete frame, or None while it is incomplete.

        :raises ProtocolError: the frame is too large, malformed, or holds an unexpected message.
            The reader can't be used after that.
        """
        data, at = self._data, self._at
        have = len(data) - at
        if have < self._need:
            return None
        if self._need == _LENGTH_BYTES:
            length = int.from_bytes(data[at : at + _LENGTH_BYTES], "big")
            self._check_length(length)
            self._need += length
            if have < self._need:
                return None
        end = at + self._need
        self._at = end
        self._need = _LENGTH_BYTES
        return self._decode(memoryview(data)[at + _LENGTH_BYTES : end])

    def _check_length(self, length: int) -> None:
        if not 2 <= length <= self._frame_bytes:
            raise ProtocolError(f"{self._peer} sent a frame of {length} bytes; 2 to {self._frame_bytes} are legal here")

    def _decode(self, body: memoryview) -> list[M]:
        count, _ = array_head(body)
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


def item_prefix(stream: int) -> bytes:
    """An encoded Item of this stream without its payload, so that each item is encoded once only."""
    return encode_message(Item(stream, msgspec.Raw(b"\xc0")))[:-1]


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


class PayloadDecoder(Generic[M]):
    """Decodes the payloads of one declared type, one by one or many at once.

    Made by :func:`decoder_for`.
    """

    __slots__ = ("_many", "_one")

    def __init__(self, wanted: Any) -> None:
        self._one: Decoder[M] = Decoder(wanted)
        self._many: Decoder[list[M]] = Decoder(list[wanted])

    def decode(self, payload: msgspec.Raw | bytes, what: str = "item") -> M:
        """Decode a payload that arrived.

        :raises PayloadError: it is not of the declared type.
        """
        try:
            return self._one.decode(payload)
        except _REFUSED as exc:
            raise PayloadError(f"{what} is not of the declared type {self._one.type!r}: {exc}") from exc

    def decode_many(self, payloads: msgspec.Raw) -> tuple[list[M], PayloadError | None]:
        """Decode an array of payloads up to the first that is not of the declared type, and tell its error."""
        try:
            return self._many.decode(payloads), None
        except _REFUSED:
            pass
        items: list[M] = []
        try:
            for payload in _SPLIT.decode(payloads):
                items.append(self.decode(payload))  # noqa: PERF401 - those before a bad one are kept
        except PayloadError as exc:
            return items, exc
        # Together too deep for the decoder, though each one alone is not.
        return items, None


_SPLIT = Decoder(list[msgspec.Raw])


def decoder_for(wanted: Any) -> PayloadDecoder[Any]:
    """The decoder of a type, cached.

    :raises PayloadError: msgspec can't decode into that type.
    """
    try:
        return _cached_decoder(wanted)
    except TypeError as exc:
        raise PayloadError(f"nothing that arrives over a channel can become a {wanted!r}: {exc}") from exc


@functools.cache
def _frame_decoder(expected: Any) -> Decoder[Any]:
    """The decoder of frames, of which there are few kinds; one for each connection would be most of what it costs."""
    return Decoder(list[expected])


@functools.lru_cache(maxsize=256)
def _cached_decoder(wanted: Any) -> PayloadDecoder[Any]:
    return PayloadDecoder(wanted)


def _array_header(count: int) -> bytes:
    return bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")


def array_head(body: msgspec.Raw | memoryview) -> tuple[int, int]:
    """Number of elements that a msgpack array says it has, and bytes of its head; 0, 0 if it is no array."""
    head = bytes(memoryview(body)[:5])
    first = head[0]
    if first & 0xF0 == 0x90:
        return first & 0x0F, 1
    width = {0xDC: 2, 0xDD: 4}.get(first)
    if width is None:
        return 0, 0
    return int.from_bytes(head[1 : 1 + width], "big"), 1 + width


# The beginning of an encoded Items: an array of three, and its tag. What follows is as in an Item.
_ITEMS_HEAD = encode_message(Items(1, msgspec.Raw(b"\xc0")))[:2]
