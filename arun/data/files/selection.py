"""What the sources share: columns chosen by name, and rows that are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from arun.errors import DataError

__all__ = ("chosen", "without_first")


def chosen(schema: pa.Schema, columns: Sequence[str] | None, name: str) -> pa.Schema:
    """The columns asked for, in the order asked for; None asks for all.

    :raises DataError: there is no such column.
    """
    if columns is None:
        return schema
    missing = [column for column in columns if column not in schema.names]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}; it has {', '.join(schema.names)}")
    return pa.schema([schema.field(column) for column in columns])


def without_first(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    """The same rows but for the first ``skip``, and no empty blocks."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
        else:
            yield batch.slice(skip)
            skip = 0
