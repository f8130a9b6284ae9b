"""Outbox: encoded messages that wait for the writer, packed into frames when it asks. No I/O.

A frame takes whatever is pending. A payload that is too large for one goes out as parts, a part a frame; they take
turns with everything else and with each other, so that what is large holds up nothing that is small.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from arun.channel.codec import (
    FRAME_BYTES,
    FRAME_MESSAGES,
    INLINE_BYTES,
    LENGTH_BYTES,
    Payload,
    Scattered,
    array_header,
    encode_message,
)
from arun.channel.messages import Item, ItemPart, Items, OpenPart

__all__ = ("PART_BYTES", "Outbox", "Run", "Transfer", "item_prefix")

PART_BYTES = 2**18

# The head of the array that Items is, see Run.
_HEADER_BYTES = 5


class Run:
    """Items of one stream that wait for the writer; they become one message.

    :ivar payloads: the encoded items, in order.
    :ivar size: bytes that it has in a frame, at most.
    :ivar room: bytes that it may still take; below 0 once it went into a frame, so that the next item needs another.
    :ivar left: items that it may still take; 0 when it is complete and may as well be on its way.
    """

    __slots__ = ("_prefix", "left", "payloads", "room", "size")

    def __init__(self, prefix: bytes, most: int) -> None:
        self._prefix = prefix
        self.payloads: list[bytes] = []
        self.size = len(prefix) + _HEADER_BYTES
        self.room = INLINE_BYTES - self.size
        self.left = most

    def add_to(self, parts: list[bytes]) -> None:
        """Add the bytes of the message: an Item, or Items if there are several."""
        self.room = -1
        if len(self.payloads) == 1:
            parts.append(self._prefix)
        else:
            parts.append(_ITEMS_HEAD + self._prefix[len(_ITEMS_HEAD) :] + array_header(len(self.payloads)))
        parts += self.payloads


class Transfer:
    """A payload that goes out in parts, after a message that announces it.

    What it is made of is only read when a part goes into a frame, so it must stay as it is until ``left`` is 0.

    :param owner: the half of a stream that it belongs to; its ``transfer`` is this until all parts are in frames.
    :param announced: the encoded message.
    :ivar left: bytes that are in no frame yet.
    """

    __slots__ = ("_at", "_pieces", "_prefix", "announced", "is_item", "left", "owner")

    def __init__(self, owner: Any, announced: bytes, part: type[ItemPart | OpenPart], payload: Payload) -> None:
        self.owner = owner
        self.announced = announced
        self.is_item = part is ItemPart
        self.left = len(payload)
        self._prefix = encode_message(part(owner.id, memoryview(b"")))[:-2]  # without the head of no bytes
        pieces = payload.pieces if isinstance(payload, Scattered) else [payload]
        self._pieces = deque(memoryview(piece) for piece in pieces)
        self._at = 0

    def take_part(self) -> list[bytes | memoryview]:
        """The next part, as a message in pieces."""
        size = wanted = min(self.left, PART_BYTES)
        parts: list[bytes | memoryview] = [self._prefix, b"\xc6" + size.to_bytes(4, "big")]
        while wanted:
            piece = self._pieces[0][self._at : self._at + wanted]
            parts.append(piece)
            wanted -= len(piece)
            self._at += len(piece)
            if self._at == len(self._pieces[0]):
                self._at = 0
                self._pieces.popleft()
        self.left -= size
        return parts

    def drop(self) -> None:
        """Say no more of it."""
        self.left = 0
        self._pieces.clear()


class Outbox:
    """What one side of a connection has to say.

    :ivar size: bytes waiting, and at most a few more for each run of items. Without what goes out in parts, which is
        held by its stream, and which nobody else has to wait for.
    :ivar appended: messages ever appended, parts apart.
    :ivar taken: messages ever packed into a frame, parts apart.
    :ivar items: ever packed into a frame.
    :ivar frames: ever packed.
    :ivar bytes: of those.
    :ivar through: owners of transfers that the last frame was the end of.
    """

    __slots__ = (
        "_messages",
        "_part_is_next",
        "_transfers",
        "appended",
        "bytes",
        "frames",
        "items",
        "size",
        "taken",
        "through",
    )

    def __init__(self) -> None:
        self._messages: deque[bytes | Run | Transfer] = deque()
        # Those that were announced; whose turn it is comes first.
        self._transfers: deque[Transfer] = deque()
        self._part_is_next = False
        self.size = 0
        self.appended = 0
        self.taken = 0
        self.items = self.frames = self.bytes = 0
        self.through: list[Any] = []

    @property
    def pending(self) -> bool:
        """Whether ``take_frame`` has something to give."""
        return bool(self._messages or self._transfers)

    def append(self, message: bytes) -> None:
        """Add one encoded message."""
        self._messages.append(message)
        self.size += len(message)
        self.appended += 1

    def append_run(self, prefix: bytes, most: int) -> Run:
        """Add a message for items of a stream that come until it is taken.

        :param prefix: of the stream's Items, see :func:`item_prefix`.
        :param most: items of one run.
        """
        run = Run(prefix, most)
        self._messages.append(run)
        self.size += run.size
        self.appended += 1
        return run

    def append_transfer(self, transfer: Transfer) -> None:
        """Add a payload that goes out in parts."""
        self._messages.append(transfer)
        self.size += len(transfer.announced)
        self.appended += 1

    def drop(self, transfer: Transfer) -> None:
        """Send no further part of it; its announcement may be on its way."""
        transfer.drop()
        if transfer in self._transfers:
            self._transfers.remove(transfer)

    def take_frame(self) -> bytes | None:
        """Pack what is pending, up to the limits of one frame, or a part; None when nothing is."""
        if self.through:
            self.through.clear()
        if self._transfers and (self._part_is_next or not self._messages):
            self._part_is_next = False
            return self._take_part()
        self._part_is_next = True
        pending = self._messages
        if not pending:
            return None
        only = pending[0]
        if len(pending) == 1 and isinstance(only, bytes):
            pending.clear()
            self.size -= len(only)
            self.taken += 1
            return self._counted((len(only) + 1).to_bytes(LENGTH_BYTES, "big") + _ARRAY_OF_ONE + only)
        parts: list[bytes] = [b""]
        count = held = 0
        while pending and count < FRAME_MESSAGES:
            message = pending[0]
            kind = type(message)
            if kind is bytes:
                size = len(message)  # type: ignore[arg-type]  # bytes
            elif kind is Run:
                size = message.size  # type: ignore[union-attr]  # a Run
            else:
                size = len(message.announced)  # type: ignore[union-attr]  # a Transfer
            if count and held + size > FRAME_BYTES:
                break
            del pending[0]
            held += size
            count += 1
            if kind is bytes:
                parts.append(message)  # type: ignore[arg-type]  # bytes
            elif kind is Run:
                self.items += len(message.payloads)  # type: ignore[union-attr]  # a Run
                message.add_to(parts)  # type: ignore[union-attr]  # a Run
            else:
                parts.append(message.announced)  # type: ignore[union-attr]  # a Transfer
                if message.left:  # type: ignore[union-attr]  # else dropped
                    self._transfers.append(message)  # type: ignore[arg-type]  # a Transfer
        self.size -= held
        self.taken += count
        parts[0] = array_header(count)
        body = b"".join(parts)
        return self._counted(len(body).to_bytes(LENGTH_BYTES, "big") + body)

    def _take_part(self) -> bytes:
        transfer = self._transfers.popleft()
        parts = transfer.take_part()
        if transfer.left:
            self._transfers.append(transfer)
        else:
            transfer.owner.transfer = None
            self.items += transfer.is_item
            self.through.append(transfer.owner)
        size = 1 + sum(map(len, parts))
        return self._counted(b"".join((size.to_bytes(LENGTH_BYTES, "big"), array_header(1), *parts)))

    def _counted(self, frame: bytes) -> bytes:
        self.frames += 1
        self.bytes += len(frame)
        return frame


def item_prefix(stream: int) -> bytes:
    """An encoded Item of this stream without its payload, so that each item is encoded once only."""
    return encode_message(Item(stream, msgspec.Raw(b"\xc0")))[:-1]


_ARRAY_OF_ONE = array_header(1)
# The beginning of an encoded Items: an array of three, and its tag. What follows is as in an Item.
_ITEMS_HEAD = encode_message(Items(1, msgspec.Raw(b"\xc0")))[:2]
