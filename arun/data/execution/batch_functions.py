"""Users' functions of batches: what they are given and what they may give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import pyarrow as pa

from arun.data.batches import BatchFormat, converter
from arun.data.block import array_of, joined, of_tensor
from arun.data.steps import BatchFunction
from arun.errors import DataError, MisuseError
from arun.guards import close_unused, shown

__all__ = ("call_on_batch", "from_results", "in_format")


def call_on_batch(step: BatchFunction, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
    """Call a plain function or generator.

    :param number: of the batch's first row in what the step was given, from 0.
    :raises Exception: the function's own error, with a note that names the step and the rows.
    """
    try:
        given = step.function(in_format(batch, step.format))
        return from_results(step, batch, given)
    except Exception as exc:
        if isinstance(exc, StopIteration):
            exc = RuntimeError(f"{step.label} raised StopIteration, which would end its rows early")
        exc.add_note(f"in {step.label}, rows {number} to {number + batch.num_rows - 1} of what it was given")
        raise exc


def in_format(batch: pa.RecordBatch, format_: BatchFormat) -> Any:
    """A batch as a function wants it."""
    return converter(format_)(batch)


def from_results(step: BatchFunction, batch: pa.RecordBatch, given: Any) -> pa.RecordBatch:
    """What a function gave for a batch, as one record batch.

    :raises MisuseError: it gave something else, or not as many rows as it promised to.
    """
    batches = [_to_batch(step, given)] if _is_batch(given) else [_to_batch(step, one) for one in _each(step, given)]
    result = joined(batches) if batches else batch.slice(0, 0)
    if step.keeps_rows and result.num_rows != batch.num_rows:
        raise MisuseError(
            f"{step.label} says keeps_rows=True, and gave {result.num_rows} rows for {batch.num_rows}; let it give one "
            "for each, or leave keeps_rows= out"
        )
    return result


def _is_batch(given: Any) -> bool:
    return isinstance(given, pa.RecordBatch | pa.Table | Mapping) or _is_frame(given)


def _is_frame(given: Any) -> bool:
    return type(given).__name__ == "DataFrame" and type(given).__module__.partition(".")[0] == "pandas"


def _each(step: BatchFunction, given: Any) -> Iterable[Any]:
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        return given
    raise _no_batch(step, given)


def _no_batch(step: BatchFunction, given: Any) -> MisuseError:
    message = (
        f"{step.label} gave {shown(given)}; it gives a RecordBatch, a Table, a dict of arrays or a DataFrame, or "
        "several of these"
    )
    close_unused(given)
    return MisuseError(message)


def _to_batch(step: BatchFunction, given: Any) -> pa.RecordBatch:
    if isinstance(given, pa.RecordBatch):
        return given
    if isinstance(given, pa.Table):
        given = given.replace_schema_metadata()
        batches = given.combine_chunks().to_batches()
        return joined(batches) if batches else pa.RecordBatch.from_pylist([], schema=given.schema)
    try:
        if isinstance(given, Mapping):
            columns = cast("Mapping[str, Any]", given)
            return pa.RecordBatch.from_arrays([_column(values) for values in columns.values()], names=list(columns))
        if _is_frame(given):
            # Not RecordBatch.from_pandas(), which refuses columns that pandas holds in several pieces, or in none.
            return _to_batch(step, pa.Table.from_pandas(given, preserve_index=False))
    except (pa.ArrowException, TypeError, ValueError) as exc:
        raise DataError(f"what {step.label} gave can't be a record batch: {exc}") from exc
    raise _no_batch(step, given)


def _column(values: Any) -> pa.Array:
    array = of_tensor(values)
    if array is not None:
        values = array
    if isinstance(values, pa.ChunkedArray):
        return values.combine_chunks()
    if getattr(values, "ndim", 1) > 1:  # a tensor: a row of it is a list of fixed length
        flat = pa.array(values.reshape(-1))
        for size in reversed(values.shape[1:]):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat
    if isinstance(values, pa.Array):
        return values
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return array_of(list(values))
