"""Schemas: making one of several, and making a block keep to one."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from arun.errors import DataError

__all__ = ("conflict", "conform", "holds_maps", "unify")


def unify(named: Iterable[tuple[str, pa.Schema]], *, remedy: str = "cast it in one of them") -> pa.Schema:
    """The schema that all of these fit in: every column that one of them has, of the wider type where types differ.

    What widens without loss: null to anything, integers and decimals, integers to floats, timestamps to finer units,
    structs by more fields.

    :param named: schemas with what a person calls each.
    :param remedy: what to do where they don't fit in one.
    :raises DataError: a column has types that don't fit in one, or a name is there twice.
    """
    unified: pa.Schema | None = None
    first: dict[str, str] = {}
    for name, schema in named:
        _refuse_duplicates(name, schema)
        for column in schema.names:
            first.setdefault(column, name)
        if unified is None:
            unified = schema
        elif not unified.equals(schema):
            try:
                unified = pa.unify_schemas([unified, schema], promote_options="permissive")
            except (pa.ArrowTypeError, pa.ArrowInvalid) as exc:
                raise _mismatch(unified, schema, first, name, remedy) from exc
    return pa.schema([]) if unified is None else unified


def conform(batch: pa.RecordBatch, schema: pa.Schema, *, name: str) -> pa.RecordBatch:
    """The same rows with exactly these columns; those that it lacks are null, what is no loss is cast.

    :param name: what a person calls the rows.
    :raises DataError: a value does not fit in its column's type.
    """
    if batch.schema.equals(schema):
        return batch
    if not schema.names:
        return batch.select([])
    columns: list[pa.Array] = []
    for field in schema:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(index)
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as exc:
                raise DataError(f"{name}: the column {field.name!r} does not fit in {field.type}: {exc}") from exc
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def conflict(schema: pa.Schema, other: pa.Schema) -> str | None:
    """What of ``other`` does not fit in ``schema``, as half a sentence; None where all of it does.

    :raises DataError: a name is there twice.
    """
    if schema.equals(other):
        return None
    _refuse_duplicates("a later block", other)
    wanted, there = set(schema.names), set(other.names)
    missing = [name for name in schema.names if name not in there]
    if missing:
        return f"the column {missing[0]!r} is missing"
    for field in other:
        if field.name not in wanted:
            return f"the column {field.name!r} is new"
        kind = schema.field(field.name).type
        if field.type != kind and _widened(kind, field.type) != kind:
            return f"the column {field.name!r} is {field.type}, not {kind}"
    return None


def holds_maps(kind: pa.DataType) -> bool:
    """Whether it is a map, or has one within."""
    return bool(pa.types.is_map(kind) or any(holds_maps(kind.field(index).type) for index in range(kind.num_fields)))


def _widened(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    try:
        return pa.unify_schemas([pa.schema([("", one)]), pa.schema([("", other)])], promote_options="permissive")[
            0
        ].type
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return None


def _refuse_duplicates(name: str, schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        twice = next(column for column in schema.names if schema.names.count(column) > 1)
        raise DataError(f"{name} has two columns {twice!r}; rename one")


def _mismatch(unified: pa.Schema, schema: pa.Schema, first: dict[str, str], name: str, remedy: str) -> DataError:
    for field in schema:
        if field.name in first and field.name in unified.names:
            before = unified.field(field.name).type
            if _widened(before, field.type) is None:
                there = f"{before} in {first[field.name]}, but {field.type} in {name}"
                return DataError(f"the column {field.name!r} is {there}; {remedy}")
    return DataError(f"the columns of {first[unified.names[0]]} and {name} don't fit together")
