"""What is known of a plan without running it: how many rows it gives, and which columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Plan, Read, Union, Write, Zip
from arun.data.steps import Drop, Limit, Rename, RowFunction, Select, Step, Where

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("known_count", "known_schema")


def known_count(node: Node) -> int | None:
    """How many rows it gives; None if only running it tells. May block: sources look into their files."""
    known: dict[int, int | None] = {}
    for one in Plan([node]).nodes:
        known[one.id] = _count(one, [known[below.id] for below in one.inputs])
    return known[node.id]


def _count(node: Node, inputs: Sequence[int | None]) -> int | None:
    match node:
        case Read():
            return node.source.count()
        case Iterate():
            return None
        case OneToOne():
            rows = inputs[0]
            for step in node.steps:
                rows = _count_after(step, rows)
            return rows
        case AllToAll():
            return inputs[0] if node.barrier.traits.keeps_rows else None
        case Union():
            return sum(rows for rows in inputs if rows is not None) if None not in inputs else None
        case Zip() | Write():
            return inputs[0]


def _count_after(step: Step, rows: int | None) -> int | None:
    if rows is None or not (step.keeps_rows or isinstance(step, Limit) or _only_reorders(step)):
        return None
    return min(rows, step.rows) if isinstance(step, Limit) else rows


def _only_reorders(step: Step) -> bool:
    return isinstance(step, RowFunction) and not step.ordered and msgspec.structs.replace(step, ordered=True).keeps_rows


def known_schema(node: Node) -> pa.Schema | None:
    """The columns that it gives; None if only running it tells. May block: sources look into their files."""
    known: dict[int, pa.Schema | None] = {}
    for one in Plan([node]).nodes:
        known[one.id] = _schema(one, [known[below.id] for below in one.inputs])
    return known[node.id]


def _schema(node: Node, inputs: Sequence[pa.Schema | None]) -> pa.Schema | None:
    match node:
        case Read():
            return node.source.schema()
        case Iterate():
            return node.schema
        case OneToOne():
            schema = inputs[0]
            for step in node.steps:
                schema = _schema_after(step, schema)
            return schema
        case AllToAll():
            return inputs[0] if node.barrier.traits.keeps_rows else None
        case Write():
            return inputs[0]
        case _:
            return None


def _schema_after(step: Step, schema: Any) -> pa.Schema | None:
    match step:
        case RowFunction() if step.schema is not None and step.on_error != "collect":
            return step.schema
        case RowFunction() if step.operation == "filter" and step.on_error != "collect":
            return schema
        case Where() | Limit():
            return schema
        case Select() | Drop() | Rename() if schema is not None:
            return _chosen(step, schema)
        case _:
            return None


def _chosen(step: Select | Drop | Rename, schema: pa.Schema) -> pa.Schema | None:
    import pyarrow as pa

    fields = {field.name: field for field in schema}
    if isinstance(step, Rename):
        return pa.schema([field.with_name(step.names.get(field.name, field.name)) for field in schema])
    kept = tuple(name for name in fields if name not in step.columns)
    wanted = step.columns if isinstance(step, Select) else kept
    return pa.schema([fields[name] for name in wanted]) if set(wanted) <= fields.keys() else None
