"""Join, on DuckDB."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final, Literal

import msgspec
import pyarrow as pa

from arun.data.barriers.columns import existing
from arun.data.barriers.duck import Statement, query
from arun.data.barriers.limits import Limits
from arun.data.barriers.relation import Relation, Table
from arun.errors import MisuseError

__all__ = ("How", "join", "joined_schema")

How = Literal["inner", "left", "right", "outer", "semi", "anti", "cross"]

_SQL: Final[Mapping[str, str]] = {
    "inner": "JOIN",
    "left": "LEFT JOIN",
    "right": "RIGHT JOIN",
    "outer": "FULL JOIN",
    "semi": "SEMI JOIN",
    "anti": "ANTI JOIN",
    "cross": "CROSS JOIN",
}


def join(
    left: Relation,
    right: Relation,
    on: str | Sequence[str] | Mapping[str, str] = (),
    how: How = "inner",
    *,
    suffix: str = "_right",
    limits: Limits | None = None,
) -> AsyncGenerator[pa.RecordBatch, None]:
    """Rows of ``left`` with the rows of ``right`` that have equal keys, in no particular order.

    A null key equals nothing, as in SQL; NaN equals itself. The columns are those of ``left``, then those of ``right``
    without its keys. Keys of two types are compared as the wider one, which is what the result has.

    :param on: columns of both; or a mapping from one of ``left`` to one of ``right``. None for a cross join.
    :param how: ``semi`` and ``anti`` give the rows of ``left`` with and without a match.
    :param suffix: what a column of ``right`` gets whose name ``left`` has, too.
    :raises MisuseError: there is no such column, keys can't be compared, or two columns would have one name.
    """
    keys = _keys(on, how)
    what = f"{how} join" + (f" on {', '.join(keys)}" if keys else "")
    allowed = limits or Limits()

    async def prepare() -> Statement | None:
        one = await left.known(None, allowed)
        other = await right.known(_keys_only(one.schema, keys), allowed)
        if one.schema is None:
            one = msgspec.structs.replace(one, schema=_keys_only(other.schema, {v: k for k, v in keys.items()}))
        if not one.schema or not other.schema:
            return None
        schema = joined_schema(one.schema, other.schema, on, how, suffix=suffix)
        one, other = _alike(one, other, keys, schema)
        tables = one.table("l", what, numbered=False), other.table("r", what, numbered=False)
        return Statement(sql=_sql(*tables, keys, how), tables=tables, schema=schema)

    return query(prepare, [left, right], what, allowed)


def joined_schema(
    left: pa.Schema,
    right: pa.Schema,
    on: str | Sequence[str] | Mapping[str, str] = (),
    how: How = "inner",
    *,
    suffix: str = "_right",
) -> pa.Schema:
    """Names and types of what :func:`join` gives.

    :raises MisuseError: there is no such column, keys can't be compared, or two columns would have one name.
    """
    keys = _keys(on, how)
    existing(keys, left, f"{how} join, left")
    existing(keys.values(), right, f"{how} join, right")
    fields = [field.with_type(_common(field, right, keys)) if field.name in keys else field for field in left]
    if how not in {"semi", "anti"}:
        rest = [field for field in right if field.name not in keys.values()]
        fields += [field.with_name(field.name + suffix) if field.name in left.names else field for field in rest]
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MisuseError(f"{how} join: two columns would be called {twice[0]!r}; give another suffix={suffix!r}")
    # Where one side may be missing, its columns are null.
    return pa.schema([field.with_nullable(True) for field in fields])


def _keys(on: str | Sequence[str] | Mapping[str, str], how: How) -> dict[str, str]:
    if how not in _SQL:
        raise MisuseError(f"join(how={how!r}): takes {', '.join(_SQL)}")
    keys = dict(on) if isinstance(on, Mapping) else {name: name for name in ([on] if isinstance(on, str) else on)}
    if bool(keys) == (how == "cross"):
        raise MisuseError(f"a {how} join takes {'no columns' if keys else 'the columns to join on'}: on={on!r}")
    return keys


def _keys_only(schema: pa.Schema | None, keys: Mapping[str, str]) -> pa.Schema | None:
    """What is known of a side without rows: that it has the keys of the other one."""
    if schema is None:
        return None
    existing(keys, schema, "join")
    return pa.schema([schema.field(own).with_name(others) for own, others in keys.items()])


def _common(field: pa.Field, right: pa.Schema, keys: Mapping[str, str]) -> pa.DataType:
    kind = right.field(keys[field.name]).type
    if kind.equals(field.type):
        return kind
    try:
        sides = [pa.schema([("key", field.type)]), pa.schema([("key", kind)])]
        return pa.unify_schemas(sides, promote_options="permissive").field(0).type
    except pa.ArrowException as exc:
        raise MisuseError(
            f"join: column {field.name!r} is of type {field.type} on the left and {kind} on the right ({exc}); "
            "cast one of them"
        ) from exc


def _alike(one: Relation, other: Relation, keys: Mapping[str, str], schema: pa.Schema) -> tuple[Relation, Relation]:
    """Both relations, their keys of the same types."""

    def with_types(relation: Relation, types: Mapping[str, pa.DataType]) -> Relation:
        fields = [field.with_type(types.get(field.name, field.type)) for field in relation.schema or ()]
        return msgspec.structs.replace(relation, schema=pa.schema(fields))

    types = {name: schema.field(name).type for name in keys}
    return with_types(one, types), with_types(other, {keys[name]: kind for name, kind in types.items()})


def _sql(left: Table, right: Table, keys: Mapping[str, str], how: How) -> str:
    columns = []
    for name in left.schema.names:
        own = left.column(name)
        either = name in keys and how in {"right", "outer"}
        columns.append(f"coalesce({own}, {right.column(keys[name])})" if either else own)
    if how not in {"semi", "anti"}:
        columns += [right.column(name) for name in right.schema.names if name not in keys.values()]
    matches = " AND ".join(f"{left.column(own)} = {right.column(others)}" for own, others in keys.items())
    condition = f" ON {matches}" if matches else ""
    return f"SELECT {', '.join(columns)} FROM {left.sql} {_SQL[how]} {right.sql}{condition}"
