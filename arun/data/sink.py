"""Sinks: where blocks go, in parts that appear whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("Part", "PartWriter", "Sink")


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A finished part of what a sink has written.

    :ivar path: of the file.
    :ivar rows: in it.
    :ivar size: bytes.
    """

    path: str
    rows: int
    size: int


class PartWriter(Protocol):
    """One part that is being written. Every method may block."""

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block.

        :raises ArunError: its schema is not that of the blocks before.
        """

    def size(self) -> int:
        """Bytes written so far, about."""
        ...

    def commit(self) -> Part:
        """Finish the file, and let it appear under its name, whole."""
        ...

    def abort(self) -> None:
        """Leave nothing of it."""


class Sink(Protocol):
    """Something that can be written in parts. Every method may block, so it is called in a thread.

    One that can go on where a killed process has left it has ``resumable = True``; see
    ``arun.data.checkpoint.journal.ResumableSink``.

    :ivar name: for people, such as ``parquet answers/``.
    :ivar part_bytes: a part that has grown past this is committed and another one begun; None: one part for all,
        which is there also when there are no rows.
    """

    name: str
    part_bytes: int | None

    def begin(self) -> None:
        """Prepare the place.

        :raises ArunError: there is something already, and the mode says not to replace it.
        """

    def part(self, name: str) -> PartWriter:
        """Begin a part; ``name`` is unique in this sink, such as ``"part-00003"``, and has no suffix yet."""
        ...

    def end(self) -> None:
        """All parts are committed: what a reader looks for to know that it is whole is written now."""
