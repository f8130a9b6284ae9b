"""Predicates: which columns an Arrow expression reads, and the rows of a block for which it holds."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from arun.data.expressions import evaluate
from arun.errors import DataError

__all__ = ("columns_of", "keep")


def columns_of(predicate: pc.Expression, schema: pa.Schema) -> list[str]:
    """The columns of ``schema`` that ``predicate`` reads.

    :raises DataError: it reads a column that isn't there, or is no condition on columns of these types.
    """
    try:
        kind = evaluate(schema.empty_table(), predicate).type
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, KeyError) as exc:
        raise DataError(f"{predicate} can't be computed on the columns {', '.join(schema.names)}: {exc}") from exc
    if not pa.types.is_boolean(kind):
        raise DataError(f"{predicate} is {kind}, no condition; compare it with something")
    # Expressions don't tell their fields: a field that it can do without is none of them.
    return [name for index, name in enumerate(schema.names) if not _works(predicate, schema.remove(index))]


def keep(batch: pa.RecordBatch, predicate: pc.Expression, columns: Sequence[str]) -> pa.RecordBatch:
    """The rows for which it holds, in order; where it is null they go.

    :param columns: those that the predicate reads.
    """
    if not batch.num_rows:
        return batch
    mask = evaluate(pa.Table.from_batches([batch.select(columns)]), predicate)
    held = mask.true_count
    if held == batch.num_rows:
        return batch
    return batch.filter(mask) if held else batch.slice(0, 0)


def _works(predicate: pc.Expression, schema: pa.Schema) -> bool:
    try:
        evaluate(schema.empty_table(), predicate)
    except (pa.ArrowInvalid, KeyError):
        return False
    return True
