"""Ranges of lines in text files: where they begin and end, and which line an offset is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final, NamedTuple

from arun.data.files.paths import File

__all__ = ("CHUNK", "Chunk", "chunks", "line_at", "told")

CHUNK: Final = 4 << 20  # bytes read at once


class Chunk(NamedTuple):
    """Whole lines.

    :ivar offset: of the first byte in the file, decompressed.
    """

    offset: int
    data: bytes


def chunks(file: File, start: int = 0, end: int | None = None) -> Iterator[Chunk]:
    """The lines that begin in bytes ``start`` to ``end`` of a file, those of one chunk together.

    A line that is longer than a chunk makes a longer one. Ranges of a compressed file begin at 0.
    """
    # The line that holds the byte before the range belongs to the range before it.
    position = max(0, start - 1)
    skipping = start > 0
    rest, at = b"", position  # of a line whose end is not read yet
    with closing(_opened(file, position)) as opened:
        while data := opened.read(CHUNK):
            begin = 0
            if skipping:
                begin = data.find(b"\n") + 1
                if not begin:
                    position += len(data)
                    continue
                at = position + begin
                if end is not None and at >= end:
                    return
                skipping = False
            stop = -1
            if end is not None and position + len(data) >= end:
                stop = data.find(b"\n", max(begin, end - 1 - position)) + 1
                if stop:
                    yield Chunk(at, rest + data[begin:stop])
                    return
            stop = data.rfind(b"\n", begin) + 1
            if stop:
                yield Chunk(at, rest + data[begin:stop])
                rest, at = data[stop:], position + stop
            else:
                rest += data[begin:]
            position += len(data)
    if rest:
        yield Chunk(at, rest)


def line_at(file: File, offset: int) -> int:
    """The number of the line that holds a byte, from 1."""
    lines = 1
    with closing(_opened(file, 0)) as opened:
        while offset > 0 and (data := opened.read(min(CHUNK, offset))):
            lines += data.count(b"\n")
            offset -= len(data)
    return lines


def told(text: bytes, error: Exception) -> str:
    """An error of a parser, or that the text it was given is in UTF-16, which it takes for something else."""
    if text.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in text:
        return "that is UTF-16, or no text; convert it to UTF-8, as by `iconv -f UTF-16 -t UTF-8`"
    return str(error)


def _opened(file: File, position: int) -> Any:
    if file.is_compressed:
        return file.stream()
    opened = file.open()
    opened.seek(position)
    return opened
