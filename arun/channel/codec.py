"""Frames and payloads. A frame is a 4-byte big-endian length, then one msgpack array of messages.

`FrameReader` takes bytes as they arrive and gives back messages; :mod:`arun.channel.outbox` packs them. A frame is held
to `FRAME_MESSAGES` and `FRAME_BYTES`, which bound the time that decoding it can block the event loop. A payload may be
larger: it comes in parts. What then bounds the time and the memory of decoding it is `STRUCTURE_BYTES`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec.msgpack import Decoder, Encoder

from arun.channel.extensions import Scattered, encode_scattered, unpack
from arun.errors import PayloadError, ProtocolError

__all__ = (
    "FRAME_BYTES",
    "FRAME_MESSAGES",
    "INLINE_BYTES",
    "LENGTH_BYTES",
    "SESSION_FRAME_BYTES",
    "STRUCTURE_BYTES",
    "FrameReader",
    "Payload",
    "PayloadDecoder",
    "Scattered",
    "array_head",
    "array_header",
    "decode_payload",
    "decoder_for",
    "encode_message",
    "encode_payload",
    "exceeds_structure",
)

FRAME_MESSAGES = 4096
FRAME_BYTES = 2**20

LENGTH_BYTES = 4
INLINE_BYTES = 2**16
"""A larger payload goes out in parts, and does not lie in a frame with others; no peer takes less than this."""

# With the head of the array that a frame is.
SESSION_FRAME_BYTES = FRAME_BYTES + 5
"""Largest frame after the handshake."""

STRUCTURE_BYTES = 2**22
"""What a payload may have besides long strings, bytes and arrays.

Python's objects are up to 72 times as large as their encoding: 16 MiB of empty maps become 1.2 GB.
"""

Payload: TypeAlias = "bytes | Scattered"
"""An encoded payload; in pieces where it holds what is not to be copied."""

_ENCODER = Encoder()
# What msgspec raises for bytes that it refuses; the last two are no MsgspecError.
_REFUSED = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)

_UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)  # a PayloadError is a TypeError
_PATH_CHARS = 200

M = TypeVar("M")

encode_message = _ENCODER.encode


class FrameReader(Generic[M]):
    """Turns a peer's bytes into messages of the expected types, and anything else into ProtocolError.

    :param peer: the peer's name, for errors.
    :param expected: the message type, or union of types, that is legal now.
    :param frame_bytes: largest frame that is legal.
    """

    __slots__ = ("_at", "_data", "_decoder", "_frame_bytes", "_need", "_peer")

    def __init__(self, peer: str, expected: Any, frame_bytes: int) -> None:
        self._peer = peer
        # A frame that came in one piece is decoded where it lies; the bytearray collects one that did not. Messages
        # are views of either, so nothing is ever removed from or added to it afterwards.
        self._data: bytes | bytearray = b""
        self._at = 0
        self._need = LENGTH_BYTES
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
        if self._need == LENGTH_BYTES:
            length = int.from_bytes(data[at : at + LENGTH_BYTES], "big")
            self._check_length(length)
            self._need += length
            if have < self._need:
                return None
        end = at + self._need
        self._at = end
        self._need = LENGTH_BYTES
        return self._decode(memoryview(data)[at + LENGTH_BYTES : end])

    def _check_length(self, length: int) -> None:
        if not 2 <= length <= self._frame_bytes:
            raise ProtocolError(f"{self._peer} sent a frame of {length} bytes; 2 to {self._frame_bytes} are legal here")

    def _decode(self, body: memoryview) -> list[M]:
        # Up to 15 messages are told by one byte.
        count = body[0] & 0x0F if body[0] & 0xF0 == 0x90 else array_head(body)[0]
        if not 1 <= count <= FRAME_MESSAGES:
            raise ProtocolError(f"{self._peer} sent a frame of {count} messages; 1 to {FRAME_MESSAGES} are legal")
        try:
            return self._decoder.decode(body)
        except _REFUSED as exc:
            raise ProtocolError(f"{self._peer} sent a frame of {len(body)} bytes that is not valid: {exc}") from exc


def encode_payload(value: object, what: str, limit: int) -> Payload:
    """Encode a value that a user wants to send.

    :param what: what the value is, for the error, as in "item of 'watch'".
    :param limit: bytes that the receiver takes.
    :raises PayloadError: msgspec can't encode it, or it is too large.
    """
    payload: Payload
    try:
        payload = _ENCODER.encode(value)
    except _UNENCODABLE:
        payload = _encode_extended(value, what)
    if len(payload) <= INLINE_BYTES:
        return payload
    if len(payload) > limit:
        raise PayloadError(
            f"{what} of type {type(value).__qualname__} has {len(payload)} bytes, the peer takes {limit}; "
            "raise Limits(message_bytes=...) there, or send it in pieces"
        )
    if len(payload) > STRUCTURE_BYTES and exceeds_structure(
        payload.pieces if isinstance(payload, Scattered) else (payload,)
    ):
        raise PayloadError(
            f"{what} of type {type(value).__qualname__} has more than {STRUCTURE_BYTES} bytes besides its strings, "
            "bytes and arrays, which would become gigabytes of objects; send it in pieces, or numbers as an array"
        )
    return payload


def _encode_extended(value: object, what: str) -> Payload:
    """Encode what msgspec alone can't: a value that holds extension types."""
    try:
        return encode_scattered(value)
    except _UNENCODABLE as exc:
        where = _culprit(value)
        at = f", at {where}," if where else ""
        raise PayloadError(
            f"{what} of type {type(value).__qualname__}{at} can't be sent over a channel: {exc}. Send what msgspec "
            "encodes: Structs, dataclasses, dicts, lists, str, bytes, numbers up to 64 bits, datetimes; or numpy "
            "arrays, torch tensors, Arrow tables, and what register_type() was told about"
        ) from exc


def _culprit(value: object) -> str:
    """Where in a value the part is that can't be encoded, as in ``['rows'][3].image``; empty where all of it can't."""
    path = ""
    while len(path) < _PATH_CHARS:  # a list may hold itself
        found = next(((step, part) for step, part in _parts(value) if not _encodes(part)), None)
        if found is None:
            break
        path, value = path + found[0], found[1]
    return path


def _parts(value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key!r:.60}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"[{number}]", part) for number, part in enumerate(value))
    else:
        names = getattr(value, "__struct_fields__", ()) or getattr(value, "__dataclass_fields__", ())
        yield from ((f".{name}", getattr(value, name, None)) for name in names)


def _encodes(value: object) -> bool:
    try:
        encode_scattered(value)
    except _UNENCODABLE:
        return False
    return True


class PayloadDecoder(Generic[M]):
    """Decodes the payloads of one declared type, one by one or many at once.

    Made by :func:`decoder_for`.
    """

    __slots__ = ("_many", "_one")

    def __init__(self, wanted: Any) -> None:
        self._one: Decoder[M] = Decoder(wanted, ext_hook=unpack)
        self._many: Decoder[list[M]] = Decoder(list[wanted], ext_hook=unpack)

    def decode(self, payload: msgspec.Raw | bytes, what: str = "item") -> M:
        """Decode a payload that arrived.

        :raises PayloadError: it is not of the declared type.
        """
        try:
            return self._one.decode(payload)
        except Exception as exc:  # a type's own __post_init__ may raise anything
            raise PayloadError(f"{what} is not of the declared type {self._one.type!r}: {exc}") from exc

    def decode_many(self, payloads: msgspec.Raw) -> tuple[list[M], PayloadError | None]:
        """Decode an array of payloads up to the first that is not of the declared type, and tell its error."""
        try:
            return self._many.decode(payloads), None
        except Exception:  # noqa: BLE001, S110  # a type may raise anything; told below, for the item
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


def decode_payload(payload: msgspec.Raw | bytes, wanted: Any = Any) -> Any:
    """Decode what a handler was asked with, extension types included.

    :param wanted: the type that it is decoded into; Any gives msgspec's builtins.
    :raises PayloadError: it is not of that type.
    """
    return decoder_for(wanted).decode(payload, "payload")


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


def array_header(count: int) -> bytes:
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


def exceeds_structure(pieces: Iterable[bytes | bytearray | memoryview]) -> bool:
    """Whether an encoded value has more than STRUCTURE_BYTES besides long strings, bytes and extensions.

    It is read token by token, which takes no longer than to decode it, and needs no memory. What is malformed is left
    to the decoder.
    """
    structure = skip = 0
    for piece in pieces:
        at, end = skip, len(piece)
        while at < end:
            match = _SHORT.match(piece, at)
            assert match is not None  # it matches nothing as well
            structure += match.end() - at
            at = match.end()
            if structure > STRUCTURE_BYTES:
                return True
            if at < end:
                width = _LONG.get(piece[at])
                if width is None:
                    return False
                length = int.from_bytes(piece[at + 1 : at + 1 + width], "big")
                at += 1 + width + length + (0xC7 <= piece[at] <= 0xC9)  # an extension has a type
                structure += _LONG_BYTES
        skip = at - end
    return structure > STRUCTURE_BYTES


# What msgpack says in a fixed number of bytes, and strings of less than 32: any number of them.
_SHORT = re.compile(
    b"(?:" + b"|".join((
        rb"[\x00-\xa0\xc0\xc2\xc3\xe0-\xff]++",
        rb"[\xcc\xd0].",
        rb"[\xcd\xd1\xdc\xde].{2}",
        rb"[\xca\xce\xd2\xdd\xdf].{4}",
        rb"[\xcb\xcf\xd3].{8}",
        *(re.escape(bytes((0xD4 + n,))) + b".{%d}" % (1 + 2**n) for n in range(5)),
        *(re.escape(bytes((0xA0 + n,))) + b".{%d}" % n for n in range(1, 32)),
    )) + b")*+",
    re.DOTALL,
)  # fmt: skip
# Long strings, bytes and extensions: their first byte, and how many bytes tell the length.
_LONG = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
# For each of them, which may be short.
_LONG_BYTES = 32
