"""What the sources share: columns chosen by name, rows that are skipped, and files that can't be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import pyarrow as pa

from arun.data.files.paths import File
from arun.errors import DataError

__all__ = ("chosen", "read_from", "without_first")

T = TypeVar("T")


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


def read_from(file: File, pieces: Iterator[T]) -> Iterator[T]:
    """What is read from a file.

    :raises DataError: its data are broken; Arrow's own errors don't tell in which file.
    """
    try:
        yield from pieces
    except (pa.ArrowException, OSError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:  # it is gone, for one, which is told with its path
            raise
        raise DataError(f"{file.path} can't be read: {exc}") from exc
