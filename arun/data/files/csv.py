"""CSV: a fragment is a file, as a line end within quotes can't be told from one between rows in the middle of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any, ClassVar, Final, Self

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv

from arun.data.files.lines import told
from arun.data.files.partitions import Partitions
from arun.data.files.paths import File, Listing, Paths
from arun.data.files.selection import chosen, read_from, without_first
from arun.data.schemas import conform, unify
from arun.data.source import Fragment
from arun.errors import DataError, MisuseError
from arun.guards import shown

__all__ = ("CsvEncoder", "CsvFormat", "CsvSource", "checked_delimiter", "csv_source", "delimiter_of")

_SUFFIXES: Final = (".csv", ".tsv")
_TABS: Final = re.compile(r"\.tsv(\.(gz|bz2|lz4|zst|br))?$")
#: A row has to fit in what is read at a time; for one that does not the rest of the file is read in larger blocks.
_LARGE_BYTES: Final = (64 << 20, 2**31 - 1)
_SAMPLE_BYTES: Final = (4 << 20, *_LARGE_BYTES)  # of a file, that its types are taken from
_BLOCK_BYTES: Final = (1 << 20, *_LARGE_BYTES)


def csv_source(
    paths: Paths,
    columns: Sequence[str] | None = None,
    *,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    null_values: Sequence[str] = ("",),
    filesystem: Any = None,
) -> CsvSource:
    """Rows of CSV files in UTF-8.

    Types are taken from the first 4 MiB of each file, and a later value of another type is an error. An empty file has
    neither rows nor columns.

    :param paths: files, folders, globs or URLs; see :mod:`arun.data.files.paths`.
    :param columns: these only, in this order; None: all.
    :param delimiter: between values; by default a tab in files that end in ``.tsv``, and a comma in others.
    :param names: of the columns, where the files have no header.
    :param types: of columns that must not be guessed.
    :param null_values: what stands for null where it is not within quotes.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    for column, kind in (types or {}).items():
        if not isinstance(kind, pa.DataType | str):
            raise MisuseError(
                f"types= says that {column!r} is {shown(kind)}; give a type of pyarrow's: pyarrow.string()"
            )
    listing = Listing(paths, _SUFFIXES, filesystem)
    how = CsvOptions(
        None if delimiter is None else checked_delimiter(delimiter),
        None if names is None else list(names),
        dict(types or {}),
        list(null_values),
    )
    columns = None if columns is None else tuple(columns)
    return CsvSource(name=f"csv {listing}", tables=_Tables(listing, how), columns=columns)


def delimiter_of(path: str) -> str:
    """What is between the values of a file, by its name."""
    return "\t" if _TABS.search(path) else ","


def checked_delimiter(delimiter: str) -> str:
    """:raises MisuseError: it can't be between values."""
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise MisuseError(f"delimiter={delimiter!r}: it must be one ASCII character, and no quote or line end")
    return delimiter


class CsvOptions(msgspec.Struct, frozen=True):
    """How the files are written."""

    delimiter: str | None
    names: list[str] | None
    types: dict[str, Any]
    null_values: list[str]


class CsvSource(msgspec.Struct, frozen=True, kw_only=True):
    """CSV files; made by :func:`csv_source`."""

    resumable: ClassVar[bool] = True
    columnless: ClassVar[bool] = True
    name: str
    tables: _Tables
    columns: tuple[str, ...] | None = None

    def schema(self) -> pa.Schema:
        """The columns.

        :raises DataError: the files' columns don't fit together, or a column was asked for that none has.
        """
        return chosen(self.tables.schema, self.columns, self.name)

    def fragments(self) -> Iterator[Fragment]:
        """The files."""
        for index, file in enumerate(self.tables.listing.files):
            yield Fragment(key=file.key, size=None if file.is_compressed else file.size, place=index)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of a file."""
        file, schema = self.tables.listing.files[fragment.place], self.schema()
        own = self.tables.own.names
        # Asked for no column, pyarrow gives all.
        batches = self.tables.read(file, [name for name in schema.names if name in own] or own[:1])
        folders = self.tables.partitions
        named = (folders.add(batch, file, schema.names) for batch in batches)
        return without_first(read_from(file, (conform(batch, schema, name=file.path) for batch in named)), skip)

    def count(self) -> None:
        """Only reading tells."""

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        return msgspec.structs.replace(self, columns=tuple(columns))

    def where(self, predicate: pc.Expression) -> None:
        """CSV must be parsed to be looked at."""


class _Tables:
    """The files and their columns, looked at once when they are first needed."""

    def __init__(self, listing: Listing, how: CsvOptions) -> None:
        self.listing = listing
        self._how = how

    @cached_property
    def own(self) -> pa.Schema:
        """What the files have."""
        schemas = ((file.path, self._head(file)) for file in self.listing.files)
        return unify(schemas, remedy="give types=")

    @cached_property
    def partitions(self) -> Partitions:
        return Partitions(self.listing.files)

    @cached_property
    def schema(self) -> pa.Schema:
        return self.partitions.beside(self.own)

    def read(self, file: File, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a file, with these columns at least."""
        if file.size == 0:
            return
        types = {field.name: field.type for field in self.own}
        rows = 0
        for block_size in _BLOCK_BYTES:
            try:
                with self._open(file, types, columns, use_threads=True, block_size=block_size) as reader:
                    for batch in without_first(reader, rows):
                        rows += batch.num_rows
                        yield batch
                return
            except (pa.ArrowInvalid, UnicodeDecodeError) as exc:
                if _is_too_small(block_size, exc):
                    continue
                raise DataError(
                    f"{file.path}: {self._where(file, types, block_size) or exc}; types= names the types"
                ) from exc

    def _where(self, file: File, types: dict[str, pa.DataType], block_size: int) -> str | None:
        """The error once more, with the number of its row, which pyarrow tells when one thread reads."""
        try:
            with self._open(file, types, [], use_threads=False, block_size=block_size) as reader:
                for _ in reader:
                    pass
        except (pa.ArrowInvalid, UnicodeDecodeError) as exc:
            return str(exc)
        return None

    def _head(self, file: File) -> pa.Schema:
        schema = pa.schema([(name, pa.null()) for name in self._how.names or ()])
        if file.size == 0:
            return schema
        for block_size in _SAMPLE_BYTES:
            try:
                with self._open(file, self._how.types, [], use_threads=False, block_size=block_size) as reader:
                    schema = reader.schema
                    _ = schema.names  # which are decoded only now
                break
            except UnicodeDecodeError as exc:
                raise DataError(f"{file.path}: its header is no UTF-8: {exc}; convert the file") from exc
            except (pa.ArrowInvalid, OSError) as exc:
                if isinstance(exc, OSError) and exc.errno is not None:
                    raise
                if not _is_too_small(block_size, exc):
                    with closing(file.stream()) as opened:
                        raise DataError(f"{file.path}: {told(opened.read(64), exc)}") from exc
        for field in schema:
            if pa.types.is_binary(field.type) and field.name not in self._how.types:
                raise DataError(
                    f"{file.path}: the column {field.name!r} holds text that is not UTF-8; convert the file, or say "
                    f"types={{{field.name!r}: pa.binary()}} to have its bytes"
                )
        return schema

    def _open(
        self,
        file: File,
        types: dict[str, pa.DataType],
        columns: list[str],
        *,
        use_threads: bool,
        block_size: int,
    ) -> Any:
        how = self._how
        return pv.open_csv(
            file.stream(),
            pv.ReadOptions(use_threads=use_threads, block_size=block_size, column_names=how.names),
            pv.ParseOptions(delimiter=how.delimiter or delimiter_of(file.path), newlines_in_values=True),
            pv.ConvertOptions(
                column_types=types,
                include_columns=columns,
                include_missing_columns=True,
                null_values=how.null_values,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_too_small(block_size: int, error: Exception) -> bool:
    return "straddling object" in str(error) and block_size < _LARGE_BYTES[-1]


class CsvFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How CSV is written: with a header, null as nothing, an empty string as ``""``.

    :ivar delimiter: between values.
    """

    delimiter: str = ","
    suffix: str = ".csv"

    word = "csv"

    def encoder(self, stream: Any, schema: pa.Schema) -> CsvEncoder:
        """Begin a file.

        :raises DataError: a column's type has no form in CSV.
        """
        for field in schema:
            if pa.types.is_nested(field.type):
                raise DataError(f"the column {field.name!r} is {field.type}, which CSV can't hold; JSON lines can")
        return CsvEncoder(pv.CSVWriter(stream, schema, write_options=pv.WriteOptions(delimiter=self.delimiter)), schema)


class CsvEncoder:
    """Writes one CSV file."""

    pending = 0

    def __init__(self, writer: Any, schema: pa.Schema) -> None:
        self._writer = writer
        self._only = schema.names[0] if len(schema.names) == 1 else None

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""
        if self._only is not None and block.column(0).null_count:
            raise DataError(f"the column {self._only!r} holds null, which in a CSV of one column is an empty line")
        try:
            self._writer.write_batch(block)
        except pa.ArrowInvalid as exc:
            columns = ", ".join(repr(field.name) for field in block.schema if _is_bytes(field.type))
            raise DataError(
                f"there are bytes that are no UTF-8 in {columns}, which CSV can't hold; JSON lines can"
            ) from exc

    def close(self) -> None:
        """End the file."""
        self._writer.close()
