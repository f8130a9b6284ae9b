"""Group-by and distinct, on DuckDB."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from arun.data.barriers.aggregation import Aggregation
from arun.data.barriers.carried import ROW
from arun.data.barriers.columns import existing
from arun.data.barriers.duck import Statement, query
from arun.data.barriers.limits import Limits
from arun.data.barriers.relation import Relation
from arun.errors import MisuseError

__all__ = ("aggregate", "aggregated_schema", "distinct")


def aggregate(
    rows: Relation,
    keys: Sequence[str],
    aggregations: Mapping[str, Aggregation | str | Sequence[Any]],
    *,
    limits: Limits | None = None,
) -> AsyncGenerator[pa.RecordBatch, None]:
    """One row for each group of rows with equal ``keys``, in no particular order.

    Null is a key like any other, and so is NaN; -0.0 equals 0.0. What ``list`` collects has to fit into the memory.

    :param keys: columns; none of them: all rows are one group, also when there are none.
    :param aggregations: by name of the result's column; see :class:`Aggregation`.
    :raises MisuseError: there is no such column, or it can't be computed of its type.
    """
    wanted = {name: Aggregation.of(spec) for name, spec in aggregations.items()}
    if both := sorted(set(keys) & set(wanted)):
        raise MisuseError(f"aggregate: {both[0]!r} is a key and a result; give the result another name")
    if not keys and not wanted:
        raise MisuseError("aggregate without keys and results has nothing to give; give it one of them")
    what = f"aggregate by {', '.join(keys)}" if keys else "aggregate"
    used = [*keys, *(one.column for one in wanted.values() if one.column is not None)]
    allowed = limits or Limits()

    async def prepare() -> Statement | None:
        known = await rows.known(pa.schema([(name, pa.null()) for name in dict.fromkeys(used)]), allowed)
        schema = aggregated_schema(known.schema, keys, wanted)
        table = known.table("t", what, numbered=any(one.ordered for one in wanted.values()))
        computed = [table.column(key) for key in keys]
        for name, one in wanted.items():
            own = None if one.column is None else table.column(one.column)
            computed.append(one.sql(own, schema.field(name).type))
        grouped = f" GROUP BY {', '.join(map(table.column, keys))}" if keys else ""
        sql = f"SELECT {', '.join(computed)} FROM {table.sql}{grouped}"
        return Statement(sql=sql, tables=(table,), schema=schema)

    return query(prepare, [rows], what, allowed)


def aggregated_schema(
    schema: pa.Schema, keys: Sequence[str], aggregations: Mapping[str, Aggregation | str | Sequence[Any]]
) -> pa.Schema:
    """Names and types of what :func:`aggregate` gives for rows of ``schema``.

    :raises MisuseError: there is no such column, or it can't be computed of its type.
    """
    wanted = {name: Aggregation.of(spec) for name, spec in aggregations.items()}
    existing([*keys, *(one.column for one in wanted.values() if one.column is not None)], schema, "aggregate")
    return pa.schema([*(schema.field(key) for key in keys), *(one.field(n, schema) for n, one in wanted.items())])


def distinct(
    rows: Relation, columns: Sequence[str] | None = None, *, limits: Limits | None = None
) -> AsyncGenerator[pa.RecordBatch, None]:
    """Each row once, in no particular order; null and NaN equal themselves, and -0.0 equals 0.0.

    :param columns: those in which rows have to differ; of equal ones the first to come stays. By default all.
    :raises MisuseError: there is no such column.
    """
    if columns is not None and not columns:
        raise MisuseError("distinct: give at least one column, or None for all of them")
    what = "distinct" if columns is None else f"distinct by {', '.join(columns)}"
    allowed = limits or Limits()

    async def prepare() -> Statement | None:
        known = await rows.known(None, allowed)
        if known.schema is None:
            return None
        table = known.table("t", what, numbered=columns is not None)
        if columns is None:
            sql = f"SELECT DISTINCT {table.columns} FROM {table.sql}"
        else:
            existing(columns, known.schema, what)
            keys = ", ".join(map(table.column, columns))
            if known.files:  # DuckDB looks for the rows that stay by their keys alone, and then reads only those
                place = f"row_number() OVER (PARTITION BY {keys} ORDER BY {ROW})"
                sql = f"SELECT {table.columns} FROM {table.sql} QUALIFY {place} = 1"
            else:
                packed = ", ".join(f"{name} := t.{name}" for name in table.carried.names)
                first = f"SELECT arg_min(struct_pack({packed}), {ROW}) AS row FROM {table.sql} GROUP BY {keys}"
                sql = f"SELECT {', '.join(f'row.{name}' for name in table.carried.names)} FROM ({first})"
        return Statement(sql=sql, tables=(table,), schema=known.schema)

    return query(prepare, [rows], what, allowed)
