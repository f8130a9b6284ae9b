"""Arrow IPC, as files (Feather) and as streams: a fragment is a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Final, Self

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from arun.data.files.partitions import Partitions
from arun.data.files.paths import File, Listing, Paths
from arun.data.files.selection import chosen, read_from, without_first
from arun.data.schemas import conform, unify
from arun.data.source import Fragment
from arun.errors import DataError

__all__ = ("IpcEncoder", "IpcFormat", "IpcSource", "ipc_source")

_SUFFIXES: Final = (".arrow", ".arrows", ".ipc", ".feather")
_MAGIC: Final = b"ARROW1"


def ipc_source(paths: Paths, columns: Sequence[str] | None = None, *, filesystem: Any = None) -> IpcSource:
    """Rows of Arrow IPC files, in the file format or the stream format.

    :param paths: files, folders, globs or URLs; see :mod:`arun.data.files.paths`.
    :param columns: these only, in this order; None: all.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    listing = Listing(paths, _SUFFIXES, filesystem)
    columns = None if columns is None else tuple(columns)
    return IpcSource(name=f"ipc {listing}", headers=_Headers(listing), columns=columns)


class IpcSource(msgspec.Struct, frozen=True, kw_only=True):
    """Arrow IPC files; made by :func:`ipc_source`."""

    resumable: ClassVar[bool] = True
    columnless: ClassVar[bool] = True
    name: str
    headers: _Headers
    columns: tuple[str, ...] | None = None

    def schema(self) -> pa.Schema:
        """The columns, from the headers of all files.

        :raises DataError: the files' columns don't fit together, or a column was asked for that none has.
        """
        return chosen(self.headers.schema, self.columns, self.name)

    def fragments(self) -> Iterator[Fragment]:
        """The files."""
        for index, file in enumerate(self.headers.listing.files):
            yield Fragment(key=file.key, size=file.size, place=index)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The record batches of a file."""
        file, schema = self.headers.listing.files[fragment.place], self.schema()
        folders = self.headers.partitions
        named = (folders.add(batch, file, schema.names) for batch in _batches(file, self.columns))
        return without_first(read_from(file, (conform(batch, schema, name=file.path) for batch in named)), skip)

    def count(self) -> int | None:
        """How many rows the files tell; streams don't."""
        total = 0
        for file in self.headers.listing.files:
            rows = _count(file)
            if rows is None:
                return None
            total += rows
        return total

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        return msgspec.structs.replace(self, columns=tuple(columns))

    def where(self, predicate: pc.Expression) -> None:
        """There are no statistics that would save reading."""


class _Headers:
    """The files and their columns, looked at once when they are first needed."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing

    @cached_property
    def schema(self) -> pa.Schema:
        schemas = ((file.path, _schema(file).remove_metadata()) for file in self.listing.files)
        return self.partitions.beside(unify(schemas, remedy="read them one by one, cast it, and union() them"))

    @cached_property
    def partitions(self) -> Partitions:
        return Partitions(self.listing.files)


def _schema(file: File) -> pa.Schema:
    with file.open() as opened:
        return _opened(file, opened, pa.ipc.IpcReadOptions()).schema


def _count(file: File) -> int | None:
    with file.open() as opened:
        reader = _opened(file, opened, pa.ipc.IpcReadOptions())
        return None if isinstance(reader, pa.ipc.RecordBatchStreamReader) else int(reader.count_rows())


def _batches(file: File, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    options = pa.ipc.IpcReadOptions()
    with file.open() as opened:
        if columns is not None:
            names = _opened(file, opened, options).schema.names
            options.included_fields = [names.index(name) for name in columns if name in names]
            opened.seek(0)
        reader = _opened(file, opened, options)
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            yield from reader
        else:
            yield from map(reader.get_batch, range(reader.num_record_batches))


def _opened(file: File, opened: Any, options: Any) -> Any:
    is_file = opened.read(len(_MAGIC)) == _MAGIC
    opened.seek(0)
    try:
        return pa.ipc.open_file(opened, options=options) if is_file else pa.ipc.open_stream(opened, options=options)
    except (pa.ArrowInvalid, OSError) as exc:
        raise DataError(f"{file.path} can't be read as Arrow IPC: {exc}") from exc


class IpcFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How Arrow IPC is written.

    :ivar compression: ``"zstd"``, ``"lz4"`` or ``"none"``.
    """

    compression: str = "none"

    suffix = ".arrow"
    word = "ipc"

    def encoder(self, stream: Any, schema: pa.Schema) -> IpcEncoder:
        """Begin a file."""
        options = pa.ipc.IpcWriteOptions(compression=None if self.compression == "none" else self.compression)
        return IpcEncoder(pa.ipc.new_file(stream, schema, options=options))


class IpcEncoder:
    """Writes one Arrow IPC file."""

    pending = 0

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""
        try:
            self._writer.write_batch(block)
        except pa.ArrowInvalid as exc:
            raise DataError(f"{exc}; cast dictionary columns to their values") from exc

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()
