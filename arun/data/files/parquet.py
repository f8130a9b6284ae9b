"""Parquet: a fragment is a row group; columns and conditions are pushed into the reading."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, ClassVar, Final, Self

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from arun.data.files.partitions import Partitions
from arun.data.files.paths import File, Listing, Paths
from arun.data.files.selection import chosen, read_from, without_first
from arun.data.schemas import conform, unify
from arun.data.source import Fragment
from arun.errors import DataError

__all__ = ("ParquetEncoder", "ParquetFormat", "ParquetSource", "parquet_source")

_SUFFIXES: Final = (".parquet", ".pq")
_BLOCK_BYTES: Final = 8 << 20  # of a block, about, as wide rows would make huge blocks of 65,536
_BLOCK_ROWS: Final = 1 << 16
_BUFFER_BYTES: Final = 1 << 20  # read at a time of a column chunk, so that memory holds blocks and not row groups
_FOOTERS_AT_ONCE: Final = 16


def parquet_source(paths: Paths, columns: Sequence[str] | None = None, *, filesystem: Any = None) -> ParquetSource:
    """Rows of Parquet files.

    Files with different columns are read as one: what a file lacks is null, types are widened where nothing is lost.
    Folders below what was named, such as ``year=2024``, are columns, and files that a condition on them rules out are
    not read.

    :param paths: files, folders, globs or URLs; see :mod:`arun.data.files.paths`.
    :param columns: these only, in this order; None: all.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    listing = Listing(paths, _SUFFIXES, filesystem)
    columns = None if columns is None else tuple(columns)
    return ParquetSource(name=f"parquet {listing}", footers=_Footers(listing), columns=columns)


class ParquetSource(msgspec.Struct, frozen=True, kw_only=True):
    """Row groups of Parquet files; made by :func:`parquet_source`."""

    resumable: ClassVar[bool] = True
    columnless: ClassVar[bool] = True
    name: str
    footers: _Footers
    columns: tuple[str, ...] | None = None
    predicate: Any = None
    # those that the predicate may read: a later select() does not take them from it
    visible: tuple[str, ...] | None = None

    @property
    def label(self) -> str:
        """What is read of it, such as ``parquet sales/ [user, amount] where (year > 2023)``."""
        columns = "" if self.columns is None else f" [{', '.join(self.columns)}]"
        return f"{self.name}{columns}{'' if self.predicate is None else f' where {self.predicate}'}"

    def schema(self) -> pa.Schema:
        """The columns, from the footers of all files.

        :raises DataError: the files' columns don't fit together, or a column was asked for that none has.
        """
        return chosen(self.footers.schema, self.columns, self.name)

    @property
    def files(self) -> tuple[File, ...]:
        """Those that the paths stand for."""
        return tuple(file for file, _ in self.footers.pieces)

    def fragments(self) -> Iterator[Fragment]:
        """The row groups, but for those that by their statistics hold no row that the predicate wants."""
        self.schema()
        asked = self._asked()
        for index, (file, piece) in enumerate(self.footers.pieces):
            metadata = piece.metadata
            for number in self._groups(piece, asked):
                group = metadata.row_group(number)
                rows = group.num_rows if self.predicate is None else None
                key, place = f"{file.key} row group {number}", (index, number)
                yield Fragment(key=key, rows=rows, size=group.total_byte_size, place=place)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, block by block."""
        index, number = fragment.place
        file, piece = self.footers.pieces[index]
        return without_first(read_from(file, self._read(file, piece, number)), skip)

    def _read(self, file: File, piece: Any, number: int) -> Iterator[pa.RecordBatch]:
        group = piece.metadata.row_group(number)
        schema, asked = self.schema(), self._asked()
        wanted, there = {*schema.names, *asked}, set(piece.physical_schema.names)
        needed = pa.schema([field for field in self.footers.schema if field.name in wanted])
        columns = [name for name in needed.names if name in there]
        rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES * group.num_rows // max(1, group.total_byte_size)))
        # Over a network many small reads would take long; there a row group is fetched at once.
        buffer = _BUFFER_BYTES if file.is_local else 0
        with (
            file.open() as opened,
            pq.ParquetFile(opened, metadata=piece.metadata, buffer_size=buffer, pre_buffer=not buffer) as reader,
        ):
            for batch in reader.iter_batches(rows, row_groups=[number], columns=columns):
                batch = self.footers.partitions.add(batch, file, needed.names)
                if self.predicate is not None:
                    from arun.data.predicates import keep

                    batch = keep(conform(batch, needed, name=file.path), self.predicate, asked)
                yield conform(batch, schema, name=file.path)

    def count(self) -> int | None:
        """How many rows the footers tell."""
        if self.predicate is not None:
            return None
        return sum(int(piece.metadata.num_rows) for _, piece in self.footers.pieces)

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        return msgspec.structs.replace(self, columns=tuple(columns))

    def where(self, predicate: pc.Expression) -> Self | None:
        """The same with only the rows for which this holds; None where there is a predicate already.

        Two as one would be computed on all rows both, and the second may fail on one that the first leaves out.
        """
        if self.predicate is not None:
            return None
        return msgspec.structs.replace(self, predicate=predicate, visible=self.columns)

    def _asked(self) -> list[str]:
        """The columns that the predicate reads."""
        return [] if self.predicate is None else self.footers.asked(self.predicate, self.visible, self.name)

    def _groups(self, piece: Any, asked: list[str]) -> list[int]:
        numbers = range(piece.metadata.num_row_groups)
        if self.predicate is None or not self._can_prune(piece.physical_schema, asked):
            return list(numbers)
        left = piece.split_by_row_group(self.predicate, schema=self.footers.schema)
        return [group.id for part in left for group in part.row_groups]

    def _can_prune(self, physical: pa.Schema, asked: list[str]) -> bool:
        """Whether arrow may decide by a file's statistics.

        It does so as if NaN were not there, which is right for plain comparisons only, as NaN fails them.
        """
        fields = [self.footers.schema.field(name) for name in asked]
        if any(field.name in physical.names and physical.field(field.name).type != field.type for field in fields):
            return False
        return not any(_has_floats(field.type) for field in fields) or _NOT_PLAIN.search(str(self.predicate)) is None


class _Footers:
    """What the footers of the files tell, read once when it is first needed."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._asked: dict[tuple[str, tuple[str, ...] | None], list[str]] = {}

    def asked(self, predicate: pc.Expression, visible: tuple[str, ...] | None, name: str) -> list[str]:
        """The columns that a predicate reads.

        :raises DataError: it can't be computed on those that are visible to it.
        """
        key = (str(predicate), visible)
        if key not in self._asked:
            from arun.data.predicates import columns_of

            self._asked[key] = columns_of(predicate, chosen(self.schema, visible, name))
        return self._asked[key]

    @cached_property
    def pieces(self) -> list[tuple[File, Any]]:
        """Each file, with pyarrow's description of it."""
        files = self._listing.files
        if len(files) == 1:
            return [self._piece(files[0])]
        with ThreadPoolExecutor(min(_FOOTERS_AT_ONCE, len(files)), thread_name_prefix="arun footers") as threads:
            return list(threads.map(self._piece, files))

    @cached_property
    def schema(self) -> pa.Schema:
        schemas = ((file.path, piece.physical_schema.remove_metadata()) for file, piece in self.pieces)
        return self.partitions.beside(unify(schemas, remedy="read them one by one, cast it, and union() them"))

    @cached_property
    def partitions(self) -> Partitions:
        return Partitions(self._listing.files)

    def _piece(self, file: File) -> tuple[File, Any]:
        piece = _described(file, None)
        said = self.partitions.expression(file, piece.physical_schema.names)
        return file, piece if said is None else _described(file, said)


def _described(file: File, said: pc.Expression | None) -> Any:
    import pyarrow.dataset as pd  # which imports pandas where that is installed: longer than all of arun.data takes

    piece = pd.ParquetFileFormat().make_fragment(file.path, file.filesystem, partition_expression=said)
    try:
        piece.ensure_complete_metadata()
    except (pa.ArrowInvalid, OSError) as exc:
        raise DataError(f"{file.path} can't be read as Parquet: {exc}") from exc
    return piece


# A function, a negation, a literal truth value, or a comparison of comparisons.
_NOT_PLAIN: Final = re.compile(r"\w\(|!=|\btrue\b|\bfalse\b|\) (==|[<>]=?) |(==|[<>]=?) \(")


def _has_floats(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_has_floats(kind.field(index).type) for index in range(kind.num_fields))
    return bool(pa.types.is_floating(kind))


class ParquetFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How Parquet is written.

    :ivar compression: ``"zstd"``, ``"snappy"``, ``"gzip"``, ``"lz4"``, ``"brotli"`` or ``"none"``.
    :ivar row_group_bytes: of Arrow memory that make one row group.
    """

    compression: str = "zstd"
    row_group_bytes: int = 32 << 20

    suffix = ".parquet"
    word = "parquet"

    def encoder(self, stream: Any, schema: pa.Schema) -> ParquetEncoder:
        """Begin a file."""
        return ParquetEncoder(self, stream, schema)


class ParquetEncoder:
    """Writes one Parquet file."""

    def __init__(self, how: ParquetFormat, stream: Any, schema: pa.Schema) -> None:
        self._how = how
        self._writer = pq.ParquetWriter(stream, schema, compression=how.compression)
        self._schema = schema
        self._blocks: list[pa.RecordBatch] = []
        self.pending = 0

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block; written are whole row groups."""
        self._blocks.append(block)
        self.pending += block.nbytes
        if self.pending >= self._how.row_group_bytes:
            self._write_group()

    def close(self) -> None:
        """Write the rest, and the footer."""
        self._write_group()
        self._writer.close()

    def _write_group(self) -> None:
        blocks, self._blocks, self.pending = self._blocks, [], 0
        if blocks:
            table = pa.Table.from_batches(blocks, self._schema)
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
