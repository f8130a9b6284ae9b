"""How a block travels through DuckDB and comes back with the very types that it had.

DuckDB knows fewer types than Arrow: a zone, a duration's unit, a dictionary or a large string would come back as
something else. So a block goes in under types that come back as they are, in whose order the values keep theirs (a
timestamp as its integer), and is cast back on its way out. Columns travel under names of ours, because DuckDB's names
know no case.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from arun.errors import DataError, MisuseError

__all__ = ("ROW", "carried_schema", "carried_type", "column", "held_to", "pack", "scanned", "unpack", "with_row")

#: Name of the column with a row's number in its input.
ROW = "r"


def column(index: int) -> str:
    """Under which name a column travels."""
    return f"c{index}"


def carried_schema(schema: pa.Schema, what: str) -> pa.Schema:
    """The types under which blocks of ``schema`` travel.

    :param what: the operation, for the error.
    :raises MisuseError: DuckDB has nothing for one of its types.
    """
    fields = []
    for index, field in enumerate(schema):
        carried = carried_type(field.type)
        if carried is None:
            raise MisuseError(
                f"{what}: column {field.name!r} is of type {field.type}, which can't travel through DuckDB; "
                "cast it to another type, or select the columns without it"
            )
        fields.append(pa.field(column(index), carried))
    return pa.schema(fields)


def carried_type(kind: pa.DataType) -> pa.DataType | None:
    """The type under which values of this one travel; None if there is none."""
    for applies, carried in _CARRIED:
        if applies(kind):
            return carried(kind) if callable(carried) else carried
    return None


def pack(block: pa.RecordBatch, schema: pa.Schema, carried: pa.Schema, first_row: int | None) -> pa.RecordBatch:
    """Give a block the types and names under which it travels.

    :param schema: what its columns are held to.
    :param first_row: number of its first row; None to travel without numbers.
    :raises DataError: it does not fit into ``schema``.
    """
    block = held_to(block, schema)
    columns = [array.cast(field.type) for array, field in zip(block.columns, carried, strict=True)]
    if first_row is None:
        return pa.RecordBatch.from_arrays(columns, schema=carried)
    ones = pa.repeat(pa.scalar(1, pa.int64()), len(block))
    numbers = pc.call_function("cumulative_sum", [ones], pc.CumulativeOptions(start=first_row))
    return pa.RecordBatch.from_arrays([*columns, numbers], schema=with_row(carried))


def with_row(carried: pa.Schema) -> pa.Schema:
    """The types of blocks that travel with the numbers of their rows."""
    return carried.append(pa.field(ROW, pa.int64()))


def unpack(batch: pa.RecordBatch, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Give what has come back the types and names that it had.

    Values of several dictionaries meet in one batch, and may be too many for one: it is halved then.
    """
    try:
        columns = [_restored(array, field.type) for array, field in zip(batch.columns, schema, strict=True)]
    except pa.ArrowInvalid:
        if len(batch) < 2:
            raise
        half = len(batch) // 2
        yield from unpack(batch.slice(0, half), schema)
        yield from unpack(batch.slice(half), schema)
    else:
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def scanned(kind: pa.DataType, quoted: str) -> str | None:
    """A column that DuckDB reads from Parquet, as SQL for a value of its carried type; None if that loses something."""
    if pt.is_timestamp(kind) and kind.unit in {"ms", "us"}:
        return f"epoch_{kind.unit}({quoted})"
    return quoted if _alike(kind) else None


def _alike(kind: pa.DataType) -> bool:
    """Whether DuckDB reads a type from Parquet as it is carried."""
    if pt.is_list(kind) or pt.is_large_list(kind):
        return _alike(kind.value_type)
    if pt.is_struct(kind):
        return carried_type(kind) is not None and all(_alike(field.type) for field in kind)
    return (
        pt.is_boolean(kind)
        or pt.is_integer(kind)
        or (pt.is_floating(kind) and not pt.is_float16(kind))
        or pt.is_decimal128(kind)
        or pt.is_date32(kind)
        or pt.is_string(kind)
        or pt.is_large_string(kind)
        or pt.is_binary(kind)
        or pt.is_large_binary(kind)
    )


def held_to(block: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The block with the columns and types of ``schema``, into which it fits; a column that it lacks is null.

    :raises DataError: it does not fit.
    """
    if block.schema.equals(schema):
        return block
    try:
        tables = [schema.empty_table(), pa.Table.from_batches([block])]
        table = pa.concat_tables(tables, promote_options="permissive").cast(schema).combine_chunks()
    except (ValueError, pa.ArrowException) as exc:
        raise DataError(
            f"a block has the columns {_listed(block.schema)} where those before it had {_listed(schema)}, and does "
            f"not fit into them ({exc}); give all rows the same types"
        ) from exc
    return table.to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], schema=schema)


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _restored(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type.equals(kind):
        return array
    if pt.is_dictionary(kind):  # a cast makes dictionaries of text only
        return _restored(array, kind.value_type).dictionary_encode().cast(kind)
    return array.cast(kind)


#: Dictionaries of these a cast makes.
_OF_TEXT = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary())


def _within(kind: pa.DataType) -> pa.DataType | None:
    """The carried type of what is in a list, struct or map, all of which one cast brings back."""
    if pt.is_dictionary(kind) and kind.value_type not in _OF_TEXT:
        return None
    return carried_type(kind)


def _list(kind: pa.DataType) -> pa.DataType | None:
    inner = _within(kind.value_type)
    return None if inner is None else pa.list_(inner)


def _struct(kind: pa.DataType) -> pa.DataType | None:
    inner = [(field.name, _within(field.type)) for field in kind]
    # An empty one, and names that differ in case only, are not DuckDB's.
    if not inner or len({name.casefold() for name, _ in inner}) < len(inner) or any(t is None for _, t in inner):
        return None
    return pa.struct(inner)


def _map(kind: pa.DataType) -> pa.DataType | None:
    key, item = _within(kind.key_type), _within(kind.item_type)
    return None if key is None or item is None else pa.map_(key, item)


def _itself(kind: pa.DataType) -> pa.DataType:
    return kind


_CARRIED = (
    (lambda t: isinstance(t, pa.BaseExtensionType), lambda t: carried_type(t.storage_type)),
    (lambda t: pt.is_dictionary(t), lambda t: carried_type(t.value_type)),
    (pt.is_float16, pa.float32()),
    (lambda t: pt.is_null(t) or pt.is_boolean(t) or pt.is_integer(t) or pt.is_floating(t) or pt.is_date32(t), _itself),
    (lambda t: pt.is_timestamp(t) or pt.is_duration(t) or pt.is_date64(t) or pt.is_time64(t), pa.int64()),
    (pt.is_time32, pa.int32()),
    (lambda t: pt.is_string(t) or pt.is_large_string(t) or pt.is_string_view(t), pa.string()),
    (
        lambda t: pt.is_binary(t) or pt.is_large_binary(t) or pt.is_fixed_size_binary(t) or pt.is_binary_view(t),
        pa.binary(),
    ),
    (lambda t: pt.is_decimal(t) and t.precision <= 38, lambda t: pa.decimal128(t.precision, t.scale)),
    (lambda t: pt.is_list(t) or pt.is_large_list(t) or pt.is_fixed_size_list(t), _list),
    (pt.is_struct, _struct),
    (pt.is_map, _map),
)
