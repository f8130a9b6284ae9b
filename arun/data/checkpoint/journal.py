"""The journal: a folder on a local disk that holds what a job has finished.

========================  ==========================================================================================
file                      holds
========================  ==========================================================================================
``job.json``              what the job is: its steps, the fragments of its source, its sink
``begun``                 nothing; it is there when the sink has been prepared
``00002-000.arrows``      blocks for part 2 of the output, as an Arrow stream; beside each, which rows it finishes
``00001.done``            that part 1 of the output is committed, and which rows were finished by it
``complete``              the parts of the whole output
``new``                   what will be one of these files when it is whole
``lock``                  is locked by the process that writes
========================  ==========================================================================================

A block is appended in one go, so that a torn end of a stream is a block that never was. Part 2 is written from its
streams, and appears under a name of its own before ``00002.done`` does; a job that is killed between the two writes the
same part again, under the same name.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import pyarrow as pa

from arun.data.block import Block
from arun.data.checkpoint.job import Job
from arun.data.checkpoint.progress import Progress, Ranges, merged, ranges_of
from arun.data.schemas import conform, unify
from arun.data.sink import Part, Sink
from arun.data.source import Fragment
from arun.errors import CheckpointError

__all__ = ("Journal", "ResumableSink")

T = TypeVar("T")

_ENTRY: Final = "arun"
_NEW: Final = "new"


class ResumableSink(Sink, Protocol):
    """A sink that can begin again where a killed process has left it.

    :ivar resumable: True.
    """

    resumable: bool

    def begin(self, mark: str = "", *, again: bool = False) -> None:
        """Prepare the place.

        :param mark: in the names of all parts of this job, so that they are told from others.
        :param again: an earlier process has begun already.
        """

    def missing(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Which of these, that were committed, are not there any more."""
        ...


class _Entry(msgspec.Struct, frozen=True, array_like=True):
    """What is finished with a block: rows, and fragments that were read to their ends, with their numbers of rows."""

    finished: Ranges
    ended: list[tuple[int, int]]


class _Done(msgspec.Struct, frozen=True):
    """A part that is committed; None where it would have had no rows."""

    part: Part | None
    finished: Ranges
    ended: list[tuple[int, int]]


class _Complete(msgspec.Struct, frozen=True):
    parts: list[Part]


class _Stored(msgspec.Struct, frozen=True):
    """``job.json``."""

    mark: str
    job: Job


class Journal:
    """What a job has finished. Its methods block; one thread at a time.

    :param folder: made if it isn't there.
    :param job: what is to be done; an earlier process must have been told the same.
    :param fragments: of the source.
    :raises CheckpointError: the folder is of another job, or in use.
    :ivar progress: which rows are finished.
    :ivar parts: of the output that are committed.
    :ivar complete: whether nothing is left to do.
    """

    def __init__(self, folder: Path, job: Job, fragments: list[Fragment]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = _locked(folder)
        try:
            self._mark = self._opened(job)
            self.progress = Progress(fragments)
            self.parts: list[Part] = []
            self.complete = False
            #: of the output, that blocks are appended for
            self._number = 0
            self._entries: list[_Entry] = []
            self._schemas: list[pa.Schema] = []
            self._segments: list[Path] = []
            self._segment: _Segment | None = None
            self._size = 0
            self._load()
        except BaseException:
            os.close(self._lock)
            raise

    def begin(self, sink: ResumableSink) -> None:
        """Prepare the sink.

        :raises CheckpointError: the output is not there any more.
        """
        missing = sink.missing(self.parts)
        if missing:
            raise CheckpointError(
                f"{self._folder} says that {missing[0].path} is written, and it is gone; bring the output back, or "
                "remove the checkpoint to begin anew"
            )
        begun = self._folder / "begun"
        sink.begin(self._mark, again=begun.exists())
        begun.touch()

    def append(self, block: Block) -> int:
        """A block has reached the sink.

        :return: bytes that wait for the next part.
        :raises DataError: its columns don't fit to those before.
        """
        entry = _Entry(ranges_of([*(block.origins or ()), *block.dropped]), self.progress.ended())
        segment = self._segment_for(block.batch)
        self._size += segment.write(block.batch if block.rows else _empty(segment.schema), entry)
        self._entries.append(entry)
        return self._size

    def commit(self, sink: Sink) -> None:
        """Make a part of what waits."""
        self._close_segment()
        ended = [pair for entry in self._entries for pair in entry.ended]
        finished = merged(span for entry in self._entries for span in entry.finished)
        _store(self._folder / f"{self._number:05}.done", _Done(self._written(sink), finished, ended))
        for path in self._segments:
            path.unlink()
        self._begin_part(self._number + 1)

    def finish(self, sink: Sink) -> list[Part]:
        """Make the last part, and of the parts the whole output."""
        if self._entries or self._is_only(sink):
            self.commit(sink)
        sink.end()
        _store(self._folder / "complete", _Complete(self.parts))
        self.complete = True
        return self.parts

    def close(self) -> None:
        """Let another process go on, or another run of this one."""
        try:
            self._close_segment()
        finally:
            os.close(self._lock)

    def _opened(self, job: Job) -> str:
        path = self._folder / "job.json"
        if path.exists():
            stored = _stored(path, _Stored)
            job.check(stored.job, self._folder)
            return stored.mark
        others = sorted(other.name for other in self._folder.iterdir() if other.name not in {"lock", _NEW})
        if others:
            raise CheckpointError(f"{self._folder} holds {others[0]} and is no checkpoint; name a folder of its own")
        mark = uuid.uuid4().hex[:8]
        _store(path, _Stored(mark, job))
        return mark

    def _load(self) -> None:
        for path in sorted(self._folder.glob("*.done")):
            done = _stored(path, _Done)
            self.progress.finish(done.finished)
            self.progress.know(done.ended)
            if done.part is not None:
                self.parts.append(done.part)
            self._number = int(path.stem) + 1
        for path in sorted(self._folder.glob("*.arrows")):
            if int(path.stem.partition("-")[0]) < self._number:
                path.unlink()  # killed before it was
                continue
            self._segments.append(path)
            self._schemas += _repaired(path, self._entries)
            self._size += path.stat().st_size
        for entry in self._entries:
            self.progress.finish(entry.finished)
            self.progress.know(entry.ended)
        complete = self._folder / "complete"
        if complete.exists():
            self.parts = _stored(complete, _Complete).parts
            self.complete = True

    def _begin_part(self, number: int) -> None:
        self._number, self._size = number, 0
        self._entries, self._schemas, self._segments = [], [], []

    def _segment_for(self, batch: pa.RecordBatch) -> _Segment:
        segment = self._segment
        if segment is not None and (segment.schema.equals(batch.schema) or not batch.num_rows):
            return segment
        name = "what the checkpoint holds"
        # What does not fit must show now, and not when all is computed and the part is to be written.
        unify([*((name, schema) for schema in self._schemas), ("what comes now", batch.schema)])
        self._close_segment()
        path = self._folder / f"{self._number:05}-{len(self._segments):03}.arrows"
        self._segments.append(path)
        self._schemas.append(batch.schema)
        self._segment = _Segment(path, batch.schema)
        return self._segment

    def _close_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.close()

    def _written(self, sink: Sink) -> Part | None:
        """The part that is made of the segments; none of no rows, unless it is the only one."""
        schemas = [schema for schema in self._schemas if schema.names]
        schema = unify((str(self._folder), schema) for schema in schemas)
        may_be_left_out = not self._is_only(sink) and (self._number or not schemas)
        if may_be_left_out and not any(batch.num_rows for batch in self._waiting()):
            return None
        writer = sink.part(f"part-{self._number:05}")
        try:
            for batch in self._waiting():
                if batch.num_columns or batch.num_rows:
                    writer.write(conform(batch, schema, name=str(self._folder)))
            part = writer.commit()
        except BaseException:
            writer.abort()
            raise
        self.parts.append(part)
        return part

    def _is_only(self, sink: Sink) -> bool:
        """Whether the next part is the one that there is also of no rows."""
        return sink.part_bytes is None and not self.parts

    def _waiting(self) -> Iterator[pa.RecordBatch]:
        for path in self._segments:
            for batch, _, _ in _read(path):
                yield batch


class _Segment:
    """An Arrow stream that is appended to; each write has reached the operating system when it returns."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._file, schema)

    def write(self, batch: pa.RecordBatch, entry: _Entry) -> int:
        """Append a block; returns its bytes."""
        before = int(self._file.tell())
        self._writer.write_batch(batch, custom_metadata={_ENTRY: msgspec.json.encode(entry)})
        return int(self._file.tell()) - before

    def close(self) -> None:
        """End the stream."""
        try:
            self._writer.close()
        finally:
            self._file.close()


def _read(path: Path, *, rows: bool = True) -> Iterator[tuple[pa.RecordBatch, _Entry, int]]:
    """The blocks of a segment, and where each ends, up to a torn one.

    :param rows: whether they are wanted; only what lies beside them is read otherwise, as the file is mapped.
    """
    if not path.stat().st_size:
        return
    with pa.OSFile(str(path)) if rows else pa.memory_map(str(path)) as opened:
        try:
            reader = pa.ipc.open_stream(opened)
            while True:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
                yield batch, msgspec.json.decode(metadata[_ENTRY], type=_Entry), opened.tell()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return


def _repaired(path: Path, entries: list[_Entry]) -> list[pa.Schema]:
    """Cut a torn block off, so that nobody ever takes it for a whole one; adds the entries of those that are whole."""
    end = 0
    schemas: list[pa.Schema] = []
    for batch, entry, position in _read(path, rows=False):
        entries.append(entry)
        schemas = [batch.schema]
        end = position
    os.truncate(path, end)
    return schemas


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=schema)


def _store(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(_NEW)
    temporary.write_bytes(msgspec.json.encode(value))
    temporary.replace(path)


def _stored(path: Path, kind: type[T]) -> T:
    """What a file holds.

    :raises CheckpointError: it is broken, as by a power cut.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as exc:
        raise CheckpointError(f"{path} is broken ({exc}); remove the checkpoint and its output to begin anew") from exc


def _locked(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(lock)
        raise CheckpointError(f"{folder} is in use by another process; wait for it, or use another folder") from exc
    return lock
