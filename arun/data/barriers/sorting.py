"""Sort, on DuckDB."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import pyarrow as pa

from arun.data.barriers.carried import ROW
from arun.data.barriers.columns import existing
from arun.data.barriers.duck import Statement, query
from arun.data.barriers.limits import Limits
from arun.data.barriers.relation import Relation
from arun.errors import MisuseError

__all__ = ("sort",)


def sort(
    rows: Relation,
    by: Sequence[str],
    *,
    descending: bool | Sequence[bool] = False,
    nulls: Literal["first", "last"] = "last",
    limit: int | None = None,
    limits: Limits | None = None,
) -> AsyncGenerator[pa.RecordBatch, None]:
    """All rows in order; equal ones in the order in which they came.

    NaN is above every other number, also infinity; -0.0 equals 0.0. Strings are ordered by their code points.

    :param by: columns, the most significant first.
    :param descending: for all of them, or one for each.
    :param nulls: where null goes, in either direction.
    :param limit: only so many of the first; the others are not kept.
    :raises MisuseError: there is no such column, or one's type can't travel through DuckDB.
    """
    directions = [descending] * len(by) if isinstance(descending, bool) else list(descending)
    if not by or len(directions) != len(by):
        raise MisuseError(
            f"sort by {len(by)} columns in {len(directions)} directions; give at least one column, and one direction "
            "for all or for each"
        )
    what = f"sort by {', '.join(by)}"
    allowed = limits or Limits()

    async def prepare() -> Statement | None:
        known = await rows.known(None, allowed)
        if known.schema is None:
            return None
        existing(by, known.schema, what)
        table = known.table("t", what, numbered=True)
        order = [
            f"{table.column(name)} {'DESC' if down else 'ASC'} NULLS {nulls.upper()}"
            for name, down in zip(by, directions, strict=True)
        ]
        sql = f"SELECT {table.columns} FROM {table.sql} ORDER BY {', '.join(order)}, t.{ROW}"
        if limit is not None:
            sql += f" LIMIT {limit}"
        return Statement(sql=sql, tables=(table,), schema=known.schema)

    return query(prepare, [rows], what, allowed)
