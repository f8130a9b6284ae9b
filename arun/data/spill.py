"""Blocks that wait: in memory up to a limit, then on disk.

``SpillingQueue`` is a FIFO of blocks with any number of readers, each at its own speed; a block is let go when all of
them have passed it. Putting never waits for a reader: what does not fit into the memory is written to a file, so that
branches of one run that wait for each other can't lock each other out.

Files have no name: they are gone with the process, however it ends.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from typing import IO, Final, NamedTuple, Self

import anyio
import anyio.lowlevel
import pyarrow as pa

from arun.errors import MisuseError
from arun.threads import run_in_thread

__all__ = ("BlockReader", "Place", "SpillFile", "SpillStatistics", "SpillingQueue")

#: Bytes in a file before the next one is begun, so that what has been read does not hold on to the disk.
_SEGMENT: Final = 64 * 2**20


class Place(NamedTuple):
    """Where a block is in a :class:`SpillFile`."""

    offset: int
    size: int


class SpillFile:
    """Blocks in one temporary file, each readable by itself, of any schema. Every method may block.

    :param folder: where; None for the system's temporary folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close(), or with this
        weakref.finalize(self, self._file.close)
        #: bytes written
        self.size = 0

    def append(self, block: pa.RecordBatch) -> Place:
        """Write a block at the end. One thread at a time."""
        offset = self._file.seek(0, os.SEEK_END)
        with pa.ipc.new_stream(pa.PythonFile(self._file, "w"), block.schema) as writer:
            writer.write_batch(block)
        self._file.flush()
        self.size = self._file.tell()
        return Place(offset, self.size - offset)

    def read(self, place: Place) -> pa.RecordBatch:
        """A block that was written. Any number of threads at a time."""
        buffer = os.pread(self._file.fileno(), place.size, place.offset)
        with pa.ipc.open_stream(buffer) as reader:
            return reader.read_next_batch()

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()


class SpillStatistics(NamedTuple):
    """What a queue holds now."""

    #: blocks
    blocks: int
    #: bytes in memory
    memory: int
    #: bytes in files
    disk: int
    #: blocks written to files, over all
    spilled: int


class _Segment:
    """A file and how many blocks in it are still wanted."""

    __slots__ = ("file", "wanted")

    def __init__(self, file: SpillFile) -> None:
        self.file = file
        self.wanted = 0


class _Entry(NamedTuple):
    #: the block, if it is in memory
    block: pa.RecordBatch | None
    #: where it is, if it is not
    segment: _Segment | None
    place: Place | None


class SpillingQueue:
    """A FIFO of blocks with readers of their own speed, that spills.

    :param memory: bytes of blocks to keep in memory.
    :param folder: for files; None for the system's temporary folder.
    :param keep: whether blocks stay until :meth:`release`, so that readers may come later and begin at the first one.
        Otherwise a block is let go when every reader has passed it, and one that comes later begins at what is held.
    """

    def __init__(self, *, memory: int, folder: str | None = None, keep: bool = False) -> None:
        self._limit = memory
        self._folder = folder
        self._keep = keep
        self._entries: deque[_Entry] = deque()
        #: number of the first entry
        self._base = 0
        self._readers: set[BlockReader] = set()
        self._current: _Segment | None = None
        self._segments: set[_Segment] = set()
        self._memory = 0
        self._spilled = 0
        self._ended = False
        self._error: Exception | None = None

    def reader(self) -> BlockReader:
        """A reader of all blocks that are held and all that come."""
        reader = BlockReader(self, self._base)
        self._readers.add(reader)
        return reader

    @property
    def wanted(self) -> bool:
        """Whether anybody would read what is put in."""
        return self._keep or bool(self._readers)

    async def put(self, block: pa.RecordBatch) -> None:
        """Append a block; by one task. It waits for the disk, never for a reader."""
        if self._ended:
            raise MisuseError("a block was put into a queue that has ended")
        if not self.wanted:
            return
        size = block.nbytes
        if self._memory + size <= self._limit:
            self._entries.append(_Entry(block, None, None))
            self._memory += size
            self._wake()
            await anyio.lowlevel.checkpoint()
            return
        segment = await self._segment()
        place = await run_in_thread(lambda: segment.file.append(block), label="spilling a block")
        if segment in self._segments:  # else everybody has left meanwhile
            segment.wanted += 1
            self._spilled += 1
            self._entries.append(_Entry(None, segment, place))
            self._wake()

    def end(self, error: Exception | None = None) -> None:
        """No more blocks come.

        :param error: raised to each reader once it has read what there is.
        """
        self._ended = True
        self._error = error
        current, self._current = self._current, None
        if current is not None:
            self._close_unwanted(current)
        self._wake()

    def release(self) -> None:
        """Let everything go, memory and files; readers see the end."""
        self._ended = True
        self._readers.clear()
        self._base += len(self._entries)
        self._entries.clear()
        self._memory = 0
        self._current = None
        while self._segments:
            self._segments.pop().file.close()

    def statistics(self) -> SpillStatistics:
        disk = sum(segment.file.size for segment in self._segments)
        return SpillStatistics(len(self._entries), self._memory, disk, self._spilled)

    async def _segment(self) -> _Segment:
        current = self._current
        if current is None or current.file.size >= _SEGMENT:
            file = await run_in_thread(lambda: SpillFile(self._folder), label="making a file to spill to")
            current, before = _Segment(file), current
            self._current = current
            self._segments.add(current)
            if before is not None:
                self._close_unwanted(before)
        return current

    async def _read(self, number: int) -> pa.RecordBatch:
        entry = self._entries[number - self._base]
        if entry.block is not None:
            return entry.block
        segment, place = entry.segment, entry.place
        assert segment is not None
        assert place is not None
        return await run_in_thread(lambda: segment.file.read(place), label="reading a spilled block")

    def _passed(self) -> None:
        """A reader has moved, or left: let go what nobody wants any more."""
        if self._keep:
            return
        if not self._readers:
            ended = self._ended
            self.release()
            self._ended = ended
            return
        first = min(reader.number for reader in self._readers)
        while self._base < first:
            entry = self._entries.popleft()
            self._base += 1
            if entry.block is not None:
                self._memory -= entry.block.nbytes
            elif entry.segment is not None:
                entry.segment.wanted -= 1
                self._close_unwanted(entry.segment)

    def _close_unwanted(self, segment: _Segment) -> None:
        if not segment.wanted and segment is not self._current:
            segment.file.close()
            self._segments.discard(segment)

    def _wake(self) -> None:
        for reader in self._readers:
            reader._wake()


class BlockReader:
    """An async iterator over the blocks of a :class:`SpillingQueue`; for one task. A cancelled read loses no block."""

    def __init__(self, queue: SpillingQueue, number: int) -> None:
        self._queue = queue
        #: of the block that comes next
        self.number = number
        self._come: anyio.Event | None = None

    @property
    def ready(self) -> bool:
        """Whether the next block, or the end, is there already."""
        queue = self._queue
        return self.number < queue._base + len(queue._entries) or queue._ended or self not in queue._readers

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pa.RecordBatch:
        queue = self._queue
        while True:
            if self not in queue._readers:
                raise StopAsyncIteration
            if self.number < queue._base + len(queue._entries):
                block = await queue._read(self.number)
                self.number += 1
                queue._passed()
                await anyio.lowlevel.cancel_shielded_checkpoint()
                return block
            if queue._ended:
                if queue._error is not None:
                    raise queue._error
                raise StopAsyncIteration
            self._come = anyio.Event()
            await self._come.wait()

    async def aclose(self) -> None:
        """Leave; the blocks that only this reader has not read are let go."""
        self._queue._readers.discard(self)
        self._queue._passed()
        await anyio.lowlevel.cancel_shielded_checkpoint()

    def _wake(self) -> None:
        if self._come is not None:
            self._come.set()
