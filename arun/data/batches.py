"""Batches for trainers: blocks cut and joined to an exact number of rows, as Arrow, NumPy, PyTorch or pandas."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from typing import Any, Final, Literal, TypeAlias, get_args

import pyarrow as pa

from arun.data.block import joined
from arun.errors import DataError, MisuseError

__all__ = ("BatchFormat", "Cutter", "converter", "iterate_batches")

BatchFormat: TypeAlias = Literal["arrow", "numpy", "torch", "pandas"]


async def iterate_batches(
    blocks: AsyncIterable[pa.RecordBatch],
    *,
    batch_size: int | None,
    format: BatchFormat = "arrow",
    drop_last: bool = False,
) -> AsyncGenerator[Any, None]:
    """Batches of a stream of blocks, in its order; whoever opened the stream closes it.

    :param batch_size: rows of each but the last; None: the blocks as they come.
    :param format: record batches; a dict of NumPy arrays, which can't be written to where they share their memory with
        the blocks; a dict of tensors, or data frames, which are the reader's own.
    :param drop_last: leave the last batch out where it is smaller.
    :raises DataError: a column has no form in that format.
    """
    convert, cutter = converter(format), Cutter(batch_size)
    async for block in blocks:
        for batch in cutter.cut(block):
            yield convert(batch)
    rest = None if drop_last else cutter.rest()
    if rest is not None:
        yield convert(rest)


class Cutter:
    """Cuts blocks into batches of exactly ``batch_size`` rows; copied is only what comes of several blocks.

    :param batch_size: rows; None: blocks stay as they are.
    """

    def __init__(self, batch_size: int | None) -> None:
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"batch_size={batch_size!r}: it takes 1 or more, or None for the blocks as they come")
        self._batch_size = batch_size
        self._waiting: deque[pa.RecordBatch] = deque()
        self._rows = 0

    def cut(self, block: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The batches that are whole with this block."""
        if self._batch_size is None:
            if block.num_rows:
                yield block
            return
        self._waiting.append(block)
        self._rows += block.num_rows
        while self._rows >= self._batch_size:
            yield self._take(self._batch_size)

    def rest(self) -> pa.RecordBatch | None:
        """The last rows, where there are some."""
        return self._take(self._rows) if self._rows else None

    def _take(self, rows: int) -> pa.RecordBatch:
        self._rows -= rows
        parts: list[pa.RecordBatch] = []
        while rows:
            first = self._waiting.popleft()
            if first.num_rows > rows:
                self._waiting.appendleft(first.slice(rows))
                first = first.slice(0, rows)
            rows -= first.num_rows
            if first.num_rows:
                parts.append(first)
        return parts[0] if len(parts) == 1 else joined(parts)


def converter(format: BatchFormat) -> Callable[[pa.RecordBatch], Any]:
    """What makes a batch of that format out of a record batch."""
    if format not in _CONVERT:
        known = ", ".join(map(repr, get_args(BatchFormat)))
        raise MisuseError(f"format={format!r}: batches come as one of {known}")
    return _CONVERT[format]


def _as_is(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch


def _to_pandas(batch: pa.RecordBatch) -> Any:
    return batch.to_pandas()


def _to_numpy(batch: pa.RecordBatch) -> dict[str, Any]:
    return {name: _array(batch.column(index)) for index, name in enumerate(batch.schema.names)}


def _array(column: pa.Array) -> Any:
    if isinstance(column, pa.FixedShapeTensorArray):
        return column.to_numpy_ndarray()
    if pa.types.is_fixed_size_list(column.type) and not column.null_count:
        return _array(column.flatten()).reshape(len(column), column.type.list_size, *_inner(column.type.value_type))
    return column.to_numpy(zero_copy_only=False)


def _inner(kind: pa.DataType) -> tuple[int, ...]:
    return (kind.list_size, *_inner(kind.value_type)) if pa.types.is_fixed_size_list(kind) else ()


def _to_torch(batch: pa.RecordBatch) -> dict[str, Any]:
    return {name: _tensor(name, batch.column(index)) for index, name in enumerate(batch.schema.names)}


def _tensor(name: str, column: pa.Array) -> Any:
    import torch

    kind = column.type
    if isinstance(column, pa.FixedShapeTensorArray):
        return torch.from_numpy(column.to_numpy_ndarray().copy())  # which is read-only
    if pa.types.is_fixed_size_list(kind) and not column.null_count:
        return _tensor(name, column.flatten()).view(len(column), kind.list_size, *_inner(kind.value_type))
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and not column.null_count:
        lengths = column.value_lengths().unique().to_pylist()
        if len(lengths) > 1:
            raise DataError(
                f"the column {name!r} is {kind} of {min(lengths)} to {max(lengths)} values, and a tensor's rows have "
                "the same length; pad them, or select() the other columns"
            )
        values = _tensor(name, column.flatten())
        return values.view(len(column), *lengths, *values.shape[1:])
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"the column {name!r} is {kind}, which PyTorch has no tensor for; select() the others")
    if column.null_count and not pa.types.is_floating(kind):
        raise DataError(f"the column {name!r} holds null, which a tensor can't; fill it, or filter it out")
    if column.null_count or pa.types.is_boolean(kind):
        return torch.from_numpy(column.to_numpy(zero_copy_only=False))
    return torch.from_dlpack(column).clone()  # or writing to it would change the rows of whoever has the block, too


_CONVERT: Final[dict[str, Callable[[pa.RecordBatch], Any]]] = {
    "arrow": _as_is,
    "numpy": _to_numpy,
    "torch": _to_torch,
    "pandas": _to_pandas,
}
