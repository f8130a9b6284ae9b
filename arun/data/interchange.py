"""Interchange: rows that other libraries hold, and rows for them. Each is imported when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, Self

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from arun.data.files.selection import chosen, without_first
from arun.data.schemas import conform
from arun.data.source import Fragment
from arun.errors import MissingExtraError, MisuseError

__all__ = (
    "arrow_source",
    "huggingface_source",
    "pandas_source",
    "ray_source",
    "to_huggingface",
    "to_pandas",
    "to_ray",
)

_BLOCK_ROWS: Final = 1 << 14
_FRAGMENT_ROWS: Final = 1 << 18


def arrow_source(data: Any, *, name: str | None = None) -> TableSource:
    """Rows of anything that speaks Arrow's C interface: tables and record batches, Polars, DuckDB, and others.

    A stream is read to its end at once.
    """
    if not (hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")):
        raise MisuseError(f"{type(data).__qualname__} has no __arrow_c_stream__, so its rows can't be taken over")
    return TableSource(name=name or f"arrow {type(data).__qualname__}", table=pa.table(data))


def pandas_source(frame: Any) -> TableSource:
    """Rows of a pandas DataFrame. An index that is more than a count becomes columns."""
    if not hasattr(frame, "columns"):
        raise MisuseError(f"{type(frame).__qualname__} is no DataFrame of pandas")
    table = pa.Table.from_pandas(frame).replace_schema_metadata()
    return TableSource(name="pandas DataFrame", table=table)


def huggingface_source(dataset: Any) -> HuggingFaceSource | StreamingSource:
    """Rows of a ``datasets.Dataset``, or of an ``IterableDataset``, which is streamed."""
    datasets = _datasets("rows of a Hugging Face dataset")
    if isinstance(dataset, datasets.Dataset):
        return HuggingFaceSource(name="huggingface Dataset", dataset=dataset.with_format("arrow"))
    if isinstance(dataset, datasets.IterableDataset):
        features = dataset.features
        known = None if features is None else features.arrow_schema.remove_metadata()
        return StreamingSource(name="huggingface IterableDataset", dataset=dataset, known=known, blocks=_streamed)
    raise MisuseError(
        f"{type(dataset).__qualname__} is no Dataset or IterableDataset of Hugging Face; of several splits take one"
    )


def ray_source(dataset: Any) -> StreamingSource:
    """Rows of a ``ray.data.Dataset``, which is executed and streamed when they are read."""
    if not hasattr(dataset, "iter_batches"):
        raise MisuseError(f"{type(dataset).__qualname__} is no Dataset of Ray")
    schema: Any = getattr(dataset.schema(fetch_if_missing=False), "base_schema", None)
    known = schema.remove_metadata() if hasattr(schema, "remove_metadata") else None  # of pandas it is another kind
    return StreamingSource(name="ray Dataset", dataset=dataset, known=known, blocks=_ray_blocks)


def to_pandas(table: pa.Table) -> Any:
    """A pandas DataFrame."""
    return table.to_pandas()


def to_huggingface(table: pa.Table) -> Any:
    """A ``datasets.Dataset`` over the same memory."""
    return _datasets("a Hugging Face dataset").Dataset(table)


def to_ray(table: pa.Table) -> Any:
    """A ``ray.data.Dataset``; the rows are put into Ray's object store."""
    try:
        import ray.data
    except ImportError as exc:
        raise MissingExtraError("a Ray dataset", extra="ray", package="ray") from exc
    return ray.data.from_arrow(table)


class TableSource(msgspec.Struct, frozen=True, kw_only=True):
    """Rows in memory; made by :func:`arrow_source` and :func:`pandas_source`."""

    name: str
    table: Any

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.table.schema

    def fragments(self) -> Iterator[Fragment]:
        """Pieces of a quarter of a million rows."""
        yield from _pieces(self.table.num_rows)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of a piece, without copying them."""
        start, rows = fragment.place
        yield from self.table.slice(start + skip, max(0, rows - skip)).to_batches(max_chunksize=_BLOCK_ROWS)

    def count(self) -> int:
        """How many rows there are."""
        return int(self.table.num_rows)

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        chosen(self.table.schema, columns, self.name)
        return msgspec.structs.replace(self, table=self.table.select(list(columns)))

    def where(self, predicate: pc.Expression) -> None:
        """Nothing is saved by it."""


class HuggingFaceSource(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of a ``datasets.Dataset`` in its order; made by :func:`huggingface_source`."""

    name: str
    dataset: Any

    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.dataset.features.arrow_schema.remove_metadata()

    def fragments(self) -> Iterator[Fragment]:
        """Pieces of a quarter of a million rows."""
        yield from _pieces(self.dataset.num_rows)

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of a piece."""
        start, rows = fragment.place
        schema, end = self.schema(), start + rows
        for first in range(start + skip, end, _BLOCK_ROWS):
            for batch in self.dataset[first : min(end, first + _BLOCK_ROWS)].to_batches():
                yield conform(batch, schema, name=self.name)

    def count(self) -> int:
        """How many rows there are."""
        return int(self.dataset.num_rows)

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        chosen(self.schema(), columns, self.name)
        return msgspec.structs.replace(self, dataset=self.dataset.select_columns(list(columns)))

    def where(self, predicate: pc.Expression) -> None:
        """Nothing is saved by it."""


class StreamingSource(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that another library streams, in one fragment."""

    name: str
    dataset: Any
    known: Any
    blocks: Any
    columns: tuple[str, ...] | None = None

    def schema(self) -> pa.Schema | None:
        """Names and types of the columns, where the library knows them before it reads."""
        return None if self.known is None else chosen(self.known, self.columns, self.name)

    def fragments(self) -> Iterator[Fragment]:
        """All of it."""
        yield Fragment(key="all")

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows, as they come."""
        return without_first(self._read(), skip)

    def _read(self) -> Iterator[pa.RecordBatch]:
        for table in self.blocks(self.dataset):
            wanted = chosen(self.known or table.schema.remove_metadata(), self.columns, self.name)
            for batch in table.to_batches():
                yield conform(batch, wanted, name=self.name)

    def count(self) -> None:
        """Only reading tells."""

    def select(self, columns: Sequence[str]) -> Self:
        """The same with these columns only."""
        return msgspec.structs.replace(self, columns=tuple(columns))

    def where(self, predicate: pc.Expression) -> None:
        """Nothing is saved by it."""


def _pieces(rows: int) -> Iterator[Fragment]:
    for start in range(0, rows, _FRAGMENT_ROWS):
        count = min(_FRAGMENT_ROWS, rows - start)
        yield Fragment(key=f"rows {start}-{start + count}", rows=count, place=(start, count))


def _streamed(dataset: Any) -> Iterator[pa.Table]:
    if dataset.features is not None:
        yield from dataset.with_format("arrow").iter(batch_size=_BLOCK_ROWS)
        return
    rows = iter(dataset)
    while taken := list(islice(rows, _BLOCK_ROWS)):
        yield pa.Table.from_pylist(taken)


def _ray_blocks(dataset: Any) -> Iterator[pa.Table]:
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError as exc:
        raise MissingExtraError(what, extra="dev", package="datasets") from exc
    return datasets
