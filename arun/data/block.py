"""Blocks: what flows between the stages of a dataset, and how rows become one.

A block is an Arrow record batch. Whoever has been handed one owns it, and lets go of it when he hands it on, so memory
is bound by the blocks that are in flight.

While a job is checkpointed, every row knows the row of the source that it came from, its *origin*: an int64 made of
the fragment's number and the row's offset in it. Origins travel beside the batch, out of sight of users' functions.
All rows of one origin stay in one block, and an origin whose rows were filtered out is in ``dropped`` of the block
that it would have been in; so whatever has been done with a block has been done with all of its origins.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Sequence
from itertools import accumulate, chain, count, repeat
from math import prod
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import msgspec
import pyarrow as pa

from arun.data.schemas import holds_maps
from arun.data.schemas import unify as schemas_of
from arun.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = (
    "Block",
    "Row",
    "Shaper",
    "array_of",
    "joined",
    "of_tensor",
    "origin_of",
    "place_of",
    "row_dicts",
    "unify",
)

#: A row as users' functions see it.
Row: TypeAlias = dict[str, Any]

#: Rows of one fragment that origins can tell apart, as a power of two; the rest of 63 bits numbers the fragments.
_OFFSET_BITS: Final = 40


class Block(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A record batch on its way.

    :ivar batch: the rows.
    :ivar origins: of each row, where a checkpoint is kept; else None.
    :ivar dropped: origins of which no row is left, where a checkpoint is kept.
    """

    batch: pa.RecordBatch
    origins: Sequence[int] | None = None
    dropped: Sequence[int] = ()

    @property
    def rows(self) -> int:
        """How many."""
        return cast("int", self.batch.num_rows)

    @property
    def size(self) -> int:
        """Bytes."""
        return cast("int", self.batch.nbytes)

    def slice(self, offset: int, rows: int | None = None) -> Block:
        """Some of its rows; nothing is copied. What was dropped goes with the first ones."""
        batch = self.batch.slice(offset) if rows is None else self.batch.slice(offset, rows)
        if self.origins is None:
            return Block(batch)
        return Block(batch, self.origins[offset : offset + cast("int", batch.num_rows)], () if offset else self.dropped)

    def whole(self, rows: int) -> int:
        """So many of its first rows, and those that have the same origin as the last one of them."""
        if self.origins is not None:
            while 0 < rows < len(self.origins) and self.origins[rows] == self.origins[rows - 1]:
                rows += 1
        return rows


def origin_of(fragment: int, offset: int) -> int:
    """The origin of a row.

    :param fragment: number of its fragment in its source, from 0.
    :param offset: of the row in the fragment, from 0.
    """
    return fragment << _OFFSET_BITS | offset


def place_of(origin: int) -> tuple[int, int]:
    """The fragment's number and the row's offset that an origin is made of."""
    return origin >> _OFFSET_BITS, origin & (1 << _OFFSET_BITS) - 1


def row_dicts(batch: pa.RecordBatch) -> list[Row]:
    """Its rows as dicts.

    :raises DataError: two columns have one name, so a dict would lose one of them.
    """
    if len(set(batch.schema.names)) < batch.num_columns:
        unify([batch.schema])
    return cast("list[Row]", batch.to_pylist())


def unify(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """The schema that the data of all of these fits into, without loss.

    :raises DataError: there is none; names the column.
    """
    named = ((f"block {number}", schema) for number, schema in enumerate(schemas))
    return schemas_of(named, remedy="give schema=... where the rows are made")


def joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    """Batches as one; nothing is copied if it is one already."""
    if len(batches) == 1:
        return batches[0]
    schema = unify(batch.schema for batch in batches)
    table = pa.concat_tables([pa.Table.from_batches([batch]) for batch in batches], promote_options="permissive")
    rows = table.cast(schema).combine_chunks().to_batches()
    return rows[0] if rows else pa.RecordBatch.from_pylist([], schema=schema)


class Shaper:
    """Makes record batches of one step's rows, all of one schema as far as the rows allow it.

    Types are those of the values. What has been seen once is kept: a column that is missing is null, one that holds
    only nulls takes the type that it had before, and integers become floats where floats have been.

    :param step: whose rows they are, for errors.
    :param schema: what they must have; None takes it from the rows.
    :param texts: columns that hold text, where they are there, also when all is null.
    :param same: whether they are the rows that the step was given, so that all columns have the types that they had.
    :ivar before: of the rows that these were made of. A column that was there has the type that it had where its values
        don't tell: those of a map are lists of pairs, and of large numbers some are small.
    """

    __slots__ = ("_given", "_same", "_step", "_texts", "_types", "before")

    def __init__(
        self, step: str, schema: pa.Schema | None = None, texts: Collection[str] = (), *, same: bool = False
    ) -> None:
        self._step = step
        self._texts = texts
        self._same = same
        self._given = schema is not None
        self.before: pa.Schema | None = None
        self._types: dict[str, pa.DataType] = (
            {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
        )

    def batch(self, rows: Sequence[Row]) -> pa.RecordBatch:
        """:raises DataError: the values of a column do not fit together; names the step and the column."""
        columns = self._columns(rows)
        if not columns:  # rows without columns are still rows
            return pa.RecordBatch.from_struct_array(pa.array([{}] * len(rows), type=pa.struct([])))
        for name in columns:
            if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
                raise DataError(f"{self._step} gave a row with the key {name!r}; names of columns are text")
        arrays = [self._array(name, values) for name, values in columns.items()]
        return pa.RecordBatch.from_arrays(arrays, names=list(columns))

    def _columns(self, rows: Sequence[Row]) -> dict[str, list[Any]]:
        known = self._types
        names: list[str] = list(known or (rows[0] if rows else ()))
        if set(map(len, rows)) == {len(names)}:
            try:
                return {name: [row[name] for row in rows] for name in names}
            except KeyError:  # as many columns, but others
                pass
        names = list(dict.fromkeys(chain(known, chain.from_iterable(rows))))
        if self._given and len(names) > len(known):
            raise DataError(
                f"{self._step} gave a row with the column {names[len(known)]!r}, which schema= does not have; it has "
                f"{', '.join(known)}"
            )
        return {name: [row.get(name) for row in rows] for name in names}

    def _array(self, name: str, values: list[Any]) -> pa.Array:
        known = self._types.get(name)
        try:
            if self._given:
                return _as_given(values, cast("pa.DataType", known))
            array = self._as_before(name, values)
            if array is None:
                array = array_of(values)
            if known is None and name in self._texts:
                known = pa.string()
            if array.type == known:
                self._types[name] = known
                return array
            # Never pa.array(values, type=known): it makes 2 of 2.5, and drops the unknown fields of a struct.
            agreed = array.type if known is None else _promote(known, array.type)
            array = array if array.type == agreed else array.cast(agreed)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as exc:
            raise DataError(
                f"the column {name!r} that {self._step} gave can't be an Arrow column"
                f"{'' if known is None else f', so far of type {known}'}: {exc}; give values of one type, or say which "
                "with schema=..."
            ) from exc
        self._types[name] = agreed
        return array

    def _as_before(self, name: str, values: list[Any]) -> pa.Array | None:
        """Of the type that the column had; None where the values tell a type, or others have come in their place."""
        index = -1 if self.before is None else self.before.get_field_index(name)
        if index < 0:
            return None
        kind = cast("pa.Schema", self.before).field(index).type
        if not (self._same or pa.types.is_uint64(kind) or holds_maps(kind)):
            return None
        try:
            array = pa.array(values, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            return None
        return array if self._same or array.to_pylist() == values else None


def array_of(values: list[Any]) -> pa.Array:
    """An array of the values' own type, also where pyarrow alone would refuse them, or cut nanoseconds off."""
    try:
        array = pa.array(values)
    except OverflowError:
        if not all(value is None or isinstance(value, int) for value in values):
            raise
        return pa.array(values, pa.uint64())
    except (pa.ArrowException, ValueError, TypeError):
        known = _without_pandas(values)
        if known is not None:
            return array_of(known)
        lists = _nested(values)
        if lists is None:
            raise
        return lists
    kind = array.type
    if (pa.types.is_timestamp(kind) or pa.types.is_duration(kind)) and kind.unit == "us":
        exact = "nanosecond" if pa.types.is_timestamp(kind) else "nanoseconds"
        if any(getattr(value, exact, 0) for value in values):
            return pa.array(values, pa.timestamp("ns", kind.tz) if pa.types.is_timestamp(kind) else pa.duration("ns"))
    return array


def _without_pandas(values: list[Any]) -> list[Any] | None:
    """With None for pandas' own nulls, which Arrow doesn't know; None where there are none of these."""
    pandas = sys.modules.get("pandas")
    if pandas is None:
        return None
    known = [None if value is pandas.NaT or value is pandas.NA else value for value in values]
    return None if all(map(operator.is_, known, values)) else known


def _nested(values: list[Any]) -> pa.Array | None:
    """Of arrays of any dimensions and tensors, as lists in lists, and of NumPy's dates; None where it is neither."""
    arrays = [_as_numpy(value) for value in values if value is not None]
    if not arrays or any(one is None for one in arrays) or len({one.ndim for one in arrays}) > 1:
        return None
    kinds = {one.dtype.kind for one in arrays}
    if len(kinds) > 1 and not kinds <= {"i", "f"}:  # of which NumPy would make text, or floats of large numbers
        return None
    array = pa.array(sys.modules["numpy"].concatenate([one.reshape(-1) for one in arrays]))
    for axis in reversed(range(arrays[0].ndim)):
        lengths = chain.from_iterable(repeat(one.shape[axis], prod(one.shape[:axis])) for one in arrays)
        array = pa.ListArray.from_arrays(pa.array(accumulate(lengths, initial=0), pa.int32()), array)
    places = count()
    return array.take(pa.array([None if value is None else next(places) for value in values], pa.int64()))


def _as_numpy(value: Any) -> Any:
    """A tensor, or what gives an array of NumPy, as such an array; None of anything else."""
    array = of_tensor(value)
    if array is None and hasattr(value, "__array__") and "numpy" in sys.modules:
        array = sys.modules["numpy"].asarray(value)
    return array


def of_tensor(value: Any) -> Any:
    """A tensor of PyTorch as an array of NumPy; None of anything else."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    # NumPy has no bfloat16; float32 holds all of it.
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy(force=True)


def _as_given(values: list[Any], given: pa.DataType) -> pa.Array:
    try:
        return array_of(values).cast(given)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        if pa.types.is_integer(given):  # pa.array() would cut off fractions
            raise
        return pa.array(values, type=given)


def _promote(known: pa.DataType, new: pa.DataType) -> pa.DataType:
    schemas = [pa.schema([("", known)]), pa.schema([("", new)])]
    return pa.unify_schemas(schemas, promote_options="permissive").types[0]
