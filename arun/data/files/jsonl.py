"""JSON lines: a fragment is a range of lines.

Most is parsed by pyarrow. What it refuses or would get wrong (a broken line, dates, decimals, bytes, text of what is no
string) is decoded line by line by msgspec, which also tells what is wrong, and where.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Final, Self, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from arun.data.block import Shaper
from arun.data.files.lines import CHUNK, Chunk, chunks, line_at, told
from arun.data.files.partitions import Partitions
from arun.data.files.paths import File, Listing, Paths
from arun.data.files.selection import chosen, read_from, without_first
from arun.data.schemas import conform, holds_maps, unify
from arun.data.source import Fragment
from arun.errors import DataError

__all__ = ("JsonLinesEncoder", "JsonLinesFormat", "JsonLinesSource", "jsonl_source")

_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_BOM: Final = b"\xef\xbb\xbf"


def jsonl_source(
    paths: Paths,
    columns: Sequence[str] | None = None,
    *,
    schema: pa.Schema | None = None,
    sample_bytes: int | None = 4 << 20,
    fragment_bytes: int = 16 << 20,
    filesystem: Any = None,
) -> JsonLinesSource:
    """Rows of files with one JSON object a line.

    Without ``schema`` the columns are those of the first lines, and a later line that doesn't fit is an error; integers
    and floats in one column are floats. With it, other fields are left out, and what a string column holds beside
    strings becomes its JSON text. Dates and times are ISO 8601, binary is base64, both only by ``schema``.

    :param paths: files, folders, globs or URLs; see :mod:`arun.data.files.paths`.
    :param columns: these only, in this order; None: all.
    :param sample_bytes: that the columns are taken from, of all files together; None: everything is read for it.
    :param fragment_bytes: of a range that is read by itself; a compressed file is one range.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    listing = Listing(paths, _SUFFIXES, filesystem)
    lines = _Lines(listing, schema, sample_bytes)
    columns = None if columns is None else tuple(columns)
    return JsonLinesSource(name=f"jsonl {listing}", lines=lines, fragment_bytes=fragment_bytes, columns=columns)


class JsonLinesSource(msgspec.Struct, frozen=True, kw_only=True):
    """Ranges of lines of JSON; made by :func:`jsonl_source`."""

    resumable: ClassVar[bool] = True
    columnless: ClassVar[bool] = True
    name: str
    lines: _Lines
    fragment_bytes: int
    columns: tuple[str, ...] | None = None

    def schema(self) -> pa.Schema:
        """The columns.

        :raises DataError: the lines' fields don't fit together, or a column was asked for that none has.
        """
        return chosen(self.lines.schema, self.columns, self.name)

    def fragments(self) -> Iterator[Fragment]:
        """The ranges, file by file."""
        for index, file in enumerate(self.lines.listing.files):
            if file.is_compressed or file.size is None:
                yield Fragment(key=file.key, place=(index, 0, None))
                continue
            for start in range(0, file.size, self.fragment_bytes):
                end = min(file.size, start + self.fragment_bytes)
                key, place = f"{file.key} bytes {start}-{end}", (index, start, end)
                yield Fragment(key=key, size=end - start, place=place)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of the lines that begin in the range."""
        index, start, end = fragment.place
        file = self.lines.listing.files[index]
        return without_first(read_from(file, self._read(file, start, end)), skip)

    def _read(self, file: File, start: int, end: int | None) -> Iterator[pa.RecordBatch]:
        schema, folders = self.schema(), self.lines.partitions
        own = set(self.lines.own.names)
        fields = pa.schema([field for field in schema if field.name in own])
        parser = _Parser(fields, given=self.lines.given is not None, strict=self._strict())
        for chunk in chunks(file, start, end):
            for batch in parser.parse(file, chunk):
                yield conform(folders.add(batch, file, schema.names), schema, name=file.path)

    def count(self) -> None:
        """Only reading tells."""

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        return msgspec.structs.replace(self, columns=tuple(columns))

    def where(self, predicate: pc.Expression) -> None:
        """JSON must be parsed to be looked at."""

    def _strict(self) -> bool:
        """Whether a field that the schema does not have is an error."""
        return self.lines.given is None and self.columns is None


class _Lines:
    """The files and their columns, looked at once when they are first needed."""

    def __init__(self, listing: Listing, given: pa.Schema | None, sample_bytes: int | None) -> None:
        self.listing = listing
        self.given = given
        self._sample_bytes = sample_bytes

    @cached_property
    def schema(self) -> pa.Schema:
        return self.partitions.beside(self.own)

    @cached_property
    def partitions(self) -> Partitions:
        return Partitions(self.listing.files)

    @cached_property
    def own(self) -> pa.Schema:
        """What the lines have."""
        if self.given is not None:
            return self.given
        together = _inferred_together(self._sampled())
        if together is not None:
            return together
        schemas = (named for file, chunk in self._sampled() for named in _inferred(file, chunk))
        return unify(schemas, remedy="give schema=, where pa.string() takes everything")

    def _sampled(self) -> Iterator[tuple[File, Chunk]]:
        files = self.listing.files
        most = None if self._sample_bytes is None else max(1, self._sample_bytes // len(files))
        for file in files:
            for chunk in read_from(file, chunks(file, 0, most)):
                yield file, chunk
                if most is not None and chunk.offset + len(chunk.data) >= most:
                    break


def _inferred_together(sampled: Iterator[tuple[File, Chunk]]) -> pa.Schema | None:
    """The schema of all chunks, several at a time, as each takes pyarrow long by itself; None where one is at fault."""
    try:
        return unify(("", _fields(data)) for data in _joined(_plain(chunk) for _, chunk in sampled))
    except (DataError, pa.ArrowException, UnicodeDecodeError):
        return None  # looked at one by one, they tell which


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Lines of several files together, up to about a chunk."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        if piece.strip():
            waiting.append(piece)
            size += len(piece)
        if size >= CHUNK:
            yield b"\n".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"\n".join(waiting)


def _inferred(file: File, chunk: Chunk) -> Iterator[tuple[str, pa.Schema]]:
    data = _plain(chunk)
    if not data.strip():
        return
    try:
        yield file.path, _fields(data)
    except (pa.ArrowInvalid, UnicodeDecodeError):
        for number, line in _numbered(file, chunk):
            row, place = _decoded(file.path, number, line, _ANY), f"{file.path}:{number}"
            try:
                yield place, Shaper(place).batch([row]).schema
            except DataError as exc:  # values of several types in one list, for one
                raise DataError(
                    f"{place}: {exc.__cause__}; give schema=, where pa.string() takes everything"
                ) from exc.__cause__


def _fields(data: bytes) -> pa.Schema:
    """What pyarrow makes of some lines, but for what it guesses, or would round."""
    table = _parsed(data)
    exact = pa.schema([pa.field(name, _exact(table[name].combine_chunks())) for name in table.schema.names])
    if not exact.equals(table.schema):
        try:
            table = _parsed(data, pj.ParseOptions(exact))
        except pa.ArrowInvalid:
            pass  # no whole numbers, or too large ones
    return pa.schema([pa.field(field.name, _without_guesses(field.type)) for field in table.schema])


def _parsed(data: bytes, how: pj.ParseOptions | None = None) -> pa.Table:
    # Not read_json(), which takes twice as long for a few lines.
    with pj.open_json(
        pa.BufferReader(data), pj.ReadOptions(use_threads=False, block_size=len(data) + 1), how
    ) as reader:
        return reader.read_all()


def _exact(array: pa.Array) -> pa.DataType:
    """The type, but uint64 instead of floats that pyarrow makes of whole numbers above the largest int64."""
    kind = array.type
    if pa.types.is_float64(kind):
        return pa.uint64() if (pc.call_function("max", [array]).as_py() or 0) >= 2**63 else kind
    if pa.types.is_list(kind):
        return pa.list_(_exact(array.flatten()))
    if pa.types.is_struct(kind):
        columns = zip(kind, array.flatten(), strict=True)
        return pa.struct([pa.field(field.name, _exact(column)) for field, column in columns])
    return kind


def _without_guesses(kind: pa.DataType) -> pa.DataType:
    """Strings that look like dates stay strings."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_guesses(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _without_guesses(field.type)) for field in kind])
    return kind


class _Parser:
    """Turns lines into blocks of one schema.

    :param given: whether the user gave it.
    :param strict: whether it has all fields.
    """

    def __init__(self, schema: pa.Schema, *, given: bool, strict: bool) -> None:
        self._schema = schema
        self._given = given
        self._strict = strict
        # pyarrow leaves out fields of structs as well, which would be a loss that nobody has asked for.
        self._is_fast = all(_is_plain(field.type) for field in schema) and (
            strict or given or not any(pa.types.is_nested(field.type) for field in schema)
        )

    def parse(self, file: File, chunk: Chunk) -> Iterator[pa.RecordBatch]:
        """The rows of a chunk; none of an empty one.

        :raises DataError: a line is no JSON object, or doesn't fit in the schema.
        """
        data = _plain(chunk)
        if not data.strip():
            return
        if self._is_fast:
            try:
                yield from self._parse_fast(data)
                return
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
                pass  # the slow way gets it right, or tells what is wrong
        yield self._parse_exactly(file, chunk)

    def _parse_fast(self, data: bytes) -> list[pa.RecordBatch]:
        behaviour = "error" if self._strict else "ignore"
        table = _parsed(data, pj.ParseOptions(self._schema, unexpected_field_behavior=behaviour))
        table.validate(full=True)  # that strings are UTF-8
        return [conform(batch, self._schema, name="") for batch in table.to_batches()]

    def _parse_exactly(self, file: File, chunk: Chunk) -> pa.RecordBatch:
        decoder, row_type = self._decoder
        rows: list[Any] = []
        for number, line in _numbered(file, chunk):
            try:
                rows.append(_decoded(file.path, number, line, decoder))
            except DataError as exc:
                if self._given or not isinstance(exc.__cause__, msgspec.ValidationError):
                    raise
                raise DataError(
                    f"{exc}. The columns are those of the first lines; give schema=, or sample_bytes=None to look at "
                    "all of them first"
                ) from exc.__cause__
        columns = [
            _array(file, field, [getattr(row, name) for row in rows])
            for name, field in zip(row_type.__struct_fields__, self._schema, strict=True)
        ]
        if not columns:
            return _no_columns(len(rows))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    @cached_property
    def _decoder(self) -> tuple[msgspec.json.Decoder[Any], type[msgspec.Struct]]:
        row_type = _struct(self._schema, strict=self._strict, text=self._given)
        return msgspec.json.Decoder(row_type), row_type


_ANY: Final = msgspec.json.Decoder(dict[str, Any])


def _plain(chunk: Chunk) -> bytes:
    return chunk.data.removeprefix(_BOM) if chunk.offset == 0 else chunk.data


def _numbered(file: File, chunk: Chunk) -> Iterator[tuple[int, bytes]]:
    first = line_at(file, chunk.offset)
    for number, line in enumerate(_plain(chunk).split(b"\n"), start=first):
        if line.strip():
            yield number, line


def _decoded(path: str, number: int, line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}:{number}: {told(line, exc)}") from exc


def _is_plain(kind: pa.DataType) -> bool:
    """Whether pyarrow reads it from JSON as we do."""
    if pa.types.is_list(kind):
        return _is_plain(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    return bool(
        pa.types.is_null(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_float32(kind)
        or pa.types.is_float64(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    )


# Of JSON values by the type of their column. Lists and structs are made of these.
_SCALARS: Final[tuple[tuple[Callable[[pa.DataType], bool], Any], ...]] = (
    (pa.types.is_null, None),
    (pa.types.is_boolean, bool),
    (pa.types.is_integer, int),
    (pa.types.is_floating, float),
    (pa.types.is_string, str),
    (pa.types.is_large_string, str),
    (pa.types.is_string_view, str),
    (pa.types.is_binary, bytes),
    (pa.types.is_large_binary, bytes),
    (pa.types.is_fixed_size_binary, bytes),
    (pa.types.is_binary_view, bytes),
    (pa.types.is_timestamp, datetime.datetime),
    (pa.types.is_date, datetime.date),
    (pa.types.is_time, datetime.time),
    (pa.types.is_duration, datetime.timedelta),
    (pa.types.is_decimal, decimal.Decimal),
)


def _struct(fields: Any, *, strict: bool, text: bool) -> type[msgspec.Struct]:
    """A Struct with these fields; names of JSON need not be names of Python."""
    names = [f"field_{index}" for index in range(len(fields))]
    typed = [
        (name, msgspec.Raw, msgspec.Raw()) if text and _is_text(field.type) else (name, _python(field.type), None)
        for name, field in zip(names, fields, strict=True)
    ]
    rename = dict(zip(names, (field.name for field in fields), strict=True))
    try:
        return msgspec.defstruct("Row", typed, rename=rename, forbid_unknown_fields=strict)
    except ValueError as exc:
        raise DataError(f"a field's name can't be read line by line: {exc}; rename it in the file") from exc


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _python(kind: pa.DataType) -> Any:
    if pa.types.is_dictionary(kind):
        return _python(kind.value_type)
    if pa.types.is_map(kind):
        return dict[_python(kind.key_type), _python(kind.item_type)] | None  # type: ignore[misc]  # made at run time
    if pa.types.is_struct(kind):
        return _struct(list(kind), strict=True, text=False) | None
    if pa.types.is_nested(kind):
        return list[_python(kind.value_type)] | None  # type: ignore[misc]  # made at run time
    for is_kind, python in _SCALARS:
        if is_kind(kind):
            return python if python is None else python | None
    raise DataError(f"JSON lines can't hold {kind}; leave the column out of the schema")


def _array(file: File, field: pa.Field, values: list[Any]) -> pa.Array:
    if values and isinstance(values[0], msgspec.Raw):
        values = [_text(value) for value in values]
    elif pa.types.is_nested(field.type):
        values = msgspec.to_builtins(values, builtin_types=_BUILTIN)
    try:
        return pa.array(values, field.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as exc:
        raise DataError(f"{file.path}: the column {field.name!r} does not fit in {field.type}: {exc}") from exc


_BUILTIN: Final = (bytes, datetime.datetime, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)


def _text(value: msgspec.Raw) -> str | None:
    raw = bytes(value)
    if raw.startswith(b'"'):
        return msgspec.json.decode(raw, type=str)
    return None if raw in {b"", b"null"} else raw.decode()


def _no_columns(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.nulls(rows)], names=["nothing"]).select([])


class JsonLinesFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How JSON lines are written: one object a line; dates and times in ISO 8601, binary in base64, maps as objects and
    NaN as null.
    """

    suffix = ".jsonl"
    word = "jsonl"

    def encoder(self, stream: Any, schema: pa.Schema) -> JsonLinesEncoder:
        """Begin a file."""
        return JsonLinesEncoder(stream, schema)


class JsonLinesEncoder:
    """Writes one file of JSON lines."""

    pending = 0

    def __init__(self, stream: Any, schema: pa.Schema) -> None:
        self._stream = stream
        self._row = _row_of(schema.names)
        self._encoder = msgspec.json.Encoder(enc_hook=str)

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""
        try:
            columns = [_values(column) for column in block.columns]
        except KeyError as exc:
            raise DataError(f"JSON objects can't hold a map with one key twice: {exc.args[0]}") from exc
        rows = list(map(self._row, *columns)) if columns else [{}] * block.num_rows
        self._stream.write(self._encoder.encode_lines(rows))

    def close(self) -> None:
        """Nothing is held back."""


def _values(column: pa.Array) -> list[Any]:
    # Asked for dicts of maps, pyarrow takes 15 times as long for other columns, too.
    return cast("list[Any]", column.to_pylist(maps_as_pydicts="strict" if holds_maps(column.type) else None))


def _row_of(names: list[str]) -> Callable[..., Any]:
    """Makes an object of JSON of the values of a row: a Struct, which takes half the time of a dict."""
    fields = [f"field_{index}" for index in range(len(names))]
    try:
        return msgspec.defstruct("Row", fields, rename=dict(zip(fields, names, strict=True)), gc=False)
    except ValueError:  # a name has quotes or line ends in it
        return lambda *values: dict(zip(names, values, strict=True))
