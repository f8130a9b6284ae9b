"""The all-to-all operations of a plan, as data; what carries them out is :mod:`arun.data.barriers`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

from arun.data import barriers
from arun.data.barriers import Aggregation, How, Limits, Relation
from arun.data.files.parquet import ParquetSource
from arun.data.logical import Traits
from arun.data.source import Source

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("Aggregate", "Distinct", "Join", "RandomShuffle", "Repartition", "Sort", "scan_of")


class Sort(msgspec.Struct, frozen=True, eq=False):
    """All rows in order."""

    by: tuple[str, ...]
    descending: bool | tuple[bool, ...] = False
    nulls: Literal["first", "last"] = "last"
    #: most rows that are wanted of it, the first ones
    limit: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        down = [self.descending] * len(self.by) if isinstance(self.descending, bool) else self.descending
        keys = (f"{name} descending" if one else name for name, one in zip(self.by, down, strict=True))
        limit = "" if self.limit is None else f", limit={self.limit}"
        return f"sort({', '.join(keys)}{limit})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        whole = self.limit is None
        return Traits(columns=self.by, keeps_rows=whole, row_by_row=whole, scans=True)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        return barriers.sort(
            inputs[0], self.by, descending=self.descending, nulls=self.nulls, limit=self.limit, limits=limits
        )


class Aggregate(msgspec.Struct, frozen=True, eq=False):
    """One row for each group."""

    keys: tuple[str, ...]
    aggregations: Mapping[str, Aggregation]

    @property
    def label(self) -> str:
        """For people."""
        computed = ", ".join(f"{name} = {one.function}({one.column or ''})" for name, one in self.aggregations.items())
        return f"group_by({', '.join(self.keys)}).aggregate({computed})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        used = [one.column for one in self.aggregations.values() if one.column is not None]
        return Traits(columns=[*self.keys, *used], keeps_rows=False, row_by_row=False, scans=True)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        return barriers.aggregate(inputs[0], self.keys, self.aggregations, limits=limits)


class Distinct(msgspec.Struct, frozen=True, eq=False):
    """Each row once."""

    by: tuple[str, ...] | None

    @property
    def label(self) -> str:
        """For people."""
        return f"distinct({', '.join(self.by or ())})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        return Traits(columns=None, keeps_rows=False, row_by_row=False, scans=True)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        return barriers.distinct(inputs[0], self.by, limits=limits)


class Join(msgspec.Struct, frozen=True, eq=False):
    """Rows of two inputs with equal keys."""

    on: str | tuple[str, ...] | Mapping[str, str]
    how: How = "inner"
    suffix: str = "_right"

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.how} join({self.on if isinstance(self.on, str) else ', '.join(self.on)})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        return Traits(columns=None, keeps_rows=False, row_by_row=False, scans=True)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        left, right = inputs
        return barriers.join(left, right, self.on, self.how, suffix=self.suffix, limits=limits)


class RandomShuffle(msgspec.Struct, frozen=True, eq=False):
    """All rows in a random order."""

    seed: int | None

    @property
    def label(self) -> str:
        """For people."""
        return "random_shuffle()" if self.seed is None else f"random_shuffle(seed={self.seed})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        # With a seed, fewer rows have another order.
        return Traits(columns=(), keeps_rows=True, row_by_row=self.seed is None, scans=False)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        assert inputs[0].blocks is not None
        return barriers.random_shuffle(inputs[0].blocks, seed=self.seed, limits=limits)


class Repartition(msgspec.Struct, frozen=True, eq=False):
    """The same rows in other blocks."""

    count: int | None = None
    rows: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        return f"repartition({self.count})" if self.count is not None else f"repartition(rows={self.rows})"

    @property
    def traits(self) -> Traits:
        """See :class:`~arun.data.logical.Barrier`."""
        return Traits(columns=(), keeps_rows=True, row_by_row=False, scans=False)

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """See :class:`~arun.data.logical.Barrier`."""
        assert inputs[0].blocks is not None
        return barriers.repartition(inputs[0].blocks, count=self.count, rows=self.rows, limits=limits)


def scan_of(source: Source) -> Relation | None:
    """A source as files that DuckDB scans itself; None where it could not, or would read something else. May block."""
    if not isinstance(source, ParquetSource) or source.predicate is not None:
        return None
    schema, pieces = source.schema(), source.footers.pieces
    if not all(file.is_local and _has(piece.physical_schema, schema) for file, piece in pieces):
        return None
    return Relation.of_files([file.path for file, _ in pieces], schema)


def _has(physical: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether a file has all columns, of these very types: DuckDB takes names and types from the first file."""
    names = physical.names
    return all(names.count(field.name) == 1 and physical.field(field.name).type == field.type for field in wanted)
