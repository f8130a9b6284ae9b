"""What workers of Ray run of a dataset: the local executor, a block or a group at a time.

So a row is treated as it is here, down to types, errors and nulls. A worker has one event loop, in a thread of its own,
for as long as it lives: what it is attached to stays attached.
"""

from __future__ import annotations

import asyncio
import decimal
import secrets
import threading
import zlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from actors.local_cluster import LocalCluster
from actors.on_ray.attached_pools import start_attached
from actors.on_ray.ray_host import import_ray
from arun.data import consumers
from arun.data.all_to_all import Aggregate, Distinct, Join
from arun.data.barriers import Limits, Relation
from arun.data.barriers.carried import carried_type, held_to
from arun.data.engines import ActorCall
from arun.data.interchange import arrow_source
from arun.data.logical import Node, OneToOne, Plan, Read, Zip
from arun.data.options import RunOptions
from arun.data.physical import lower
from arun.data.running import run_plan
from arun.data.sink import Sink
from arun.data.source import Fragment, Source
from arun.data.steps import RowFunction, Step

__all__ = (
    "BUCKET",
    "ActorSteps",
    "AddSortKeys",
    "Combine",
    "CrossJoin",
    "HeldTo",
    "Mark",
    "Piece",
    "Steps",
    "WriteParts",
    "nothing",
    "read_fragment",
    "rows_of",
    "schema_of",
    "sort_keys",
    "zipped",
)

T = TypeVar("T")

#: The column by which rows that belong together find each other.
BUCKET: Final = "\0bucket"
_SIDE: Final = "\0side"
_PLACE: Final = "\0place"
_ROWS: Final = "\0rows"
#: Into how many groups all keys fall.
_BUCKETS: Final = 64
#: Rows that a cross join makes at a time, about.
_CROSSED_ROWS: Final = 1 << 18


def read_fragment(source: Source, fragment: Fragment) -> Iterator[pa.Table]:
    """The rows of a fragment."""
    for batch in source.read(fragment):
        yield pa.Table.from_batches([batch])


class Steps:
    """Runs steps over a block."""

    def __init__(self, steps: Sequence[Step], options: RunOptions) -> None:
        self._steps = tuple(steps)
        self._options = options

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        yield from _if_any(_finish(_table_of(OneToOne(self._steps, Read(arrow_source(block))), self._options)))


class ActorSteps:
    """Runs a step over blocks in an actor of its own, which is started again as its options say.

    :param spawn: the actor's class, its arguments, and what ``spawn`` takes by name.
    """

    def __init__(
        self,
        step: RowFunction,
        spawn: tuple[type[Any], Sequence[Any], Mapping[str, Any]],
        method: str,
        in_flight: int,
        options: RunOptions,
    ) -> None:
        cls, args, named = spawn
        self._cluster = LocalCluster()
        call = ActorCall(self._cluster, cls, method, args=args, options=named, replicas=1, in_flight=in_flight)
        step = msgspec.structs.replace(step, function=_finish(self._open(call)), concurrency=in_flight)
        self._steps = Steps((step,), options)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        yield from self._steps(block)

    async def _open(self, call: ActorCall) -> Any:
        await self._cluster.__aenter__()
        return await call.open()


class HeldTo:
    """Gives blocks one schema, into which they fit: Ray's shuffles don't."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for batch in block.combine_chunks().to_batches():
            yield pa.Table.from_batches([held_to(batch, self._schema)])


def rows_of(block: pa.Table) -> int:
    """How many a block has."""
    return len(block)


def schema_of(block: pa.Table) -> pa.Schema:
    """That of a block."""
    return block.schema


class WriteParts:
    """Writes a block as a part of a sink, and gives what was written."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def __call__(self, block: pa.Table) -> pa.Table:
        if not len(block):
            return pa.table({"path": [], "rows": [], "size": []}, schema=PARTS)
        task, number = _place()
        writer = self._sink.part(f"part-{task:05}-{number:03}")  # of which a task that is run again replaces its own
        try:
            for batch in block.to_batches():
                writer.write(batch)
            part = writer.commit()
        except BaseException:
            writer.abort()
            raise
        return pa.table({"path": [part.path], "rows": [part.rows], "size": [part.size]}, schema=PARTS)


PARTS: Final = pa.schema({"path": pa.string(), "rows": pa.int64(), "size": pa.int64()})


_MARKED: Final = pa.schema({BUCKET: pa.int64(), _SIDE: pa.int8(), _PLACE: pa.int64(), _ROWS: pa.large_binary()})


class Mark:
    """Gives the rows of a block to groups, by their keys: one row a group, with those that go to it in Arrow's format.

    So Ray moves blocks of one schema, whatever is in them. Every group is told of the columns, also if it gets no rows,
    and of the place of the block among all.

    :param keys: none of them: all rows go to one group; None: all columns are.
    :param side: which of a join's inputs it is.
    """

    def __init__(self, keys: Sequence[str] | None, side: int = 0) -> None:
        self._keys = keys
        self._side = side

    def __call__(self, block: pa.Table) -> pa.Table:
        keys = block.column_names if self._keys is None else self._keys
        if not block.column_names or not keys:
            groups = {0: block} if block.column_names else {}
        else:
            columns = [_carried(block.column(key)).to_pylist() for key in keys]
            found = [_stable_hash(values) % _BUCKETS for values in zip(*columns, strict=True)]
            buckets = pa.array(found, pa.int64())
            groups = {one: block.filter(pc.call_function("equal", [buckets, one])) for one in range(_BUCKETS)}
        rows = [_encoded(group) for group in groups.values()]
        sides = pa.repeat(pa.scalar(self._side, pa.int8()), len(groups))
        task, number = _place()
        places = pa.repeat(pa.scalar(task << _TASK_BITS | number), len(groups))
        return pa.table(
            [pa.array(groups, pa.int64()), sides, places, pa.array(rows, pa.large_binary())], schema=_MARKED
        )


def nothing(columns: Iterable[str]) -> pa.Table:
    """What tells the only group of its columns, should there be no rows at all."""
    table = pa.table({name: pa.nulls(0) for name in columns})
    return pa.table({BUCKET: [0], _SIDE: [0], _PLACE: [0], _ROWS: [_encoded(table)]}, schema=_MARKED)


class Combine:
    """Runs a barrier over all rows of a group."""

    def __init__(self, barrier: Aggregate | Distinct | Join, options: RunOptions) -> None:
        self._barrier = barrier
        self._options = options

    def __call__(self, group: pa.Table) -> Iterator[pa.Table]:
        sides = [_side(group, side) for side in ((0, 1) if isinstance(self._barrier, Join) else (0,))]
        # Of no rows comes no row, at the price of a DuckDB for each. The first group is asked all the same: without
        # keys it has one row also then, and with them it tells what is wrong with the columns.
        if group.column(BUCKET)[0].as_py() == 0 or any(map(len, sides)):
            yield from self.of(sides)

    def of(self, sides: Sequence[pa.Table]) -> Iterator[pa.Table]:
        """Run it over its inputs."""
        relations = [Relation.of_blocks(_blocks(side), side.schema if side.column_names else None) for side in sides]
        limits = Limits(memory=self._options.memory_limit, folder=self._options.folder)
        yield from _if_any(_finish(_collect(self._barrier.run(relations, limits))))


class CrossJoin:
    """Joins a block with all blocks of the other side.

    :param others: where those lie in Ray's object store.
    """

    def __init__(self, join: Join, others: Sequence[Any], options: RunOptions) -> None:
        self._combine = Combine(join, options)
        self._others = others

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for ref in self._others:
            other: pa.Table = import_ray().get(ref)
            rows = max(1, _CROSSED_ROWS // len(other))
            for start in range(0, len(block), rows):
                yield from self._combine.of([block.slice(start, rows), other])


class Piece(NamedTuple):
    """Some rows of a block.

    :ivar block: its number among those of its input.
    """

    block: int
    start: int
    rows: int


def zipped(pieces: Sequence[Sequence[Piece]], options: RunOptions, *blocks: pa.Table) -> pa.Table:
    """As many rows of each input, side by side.

    :param blocks: that the pieces are of, one for each, those of the first input first.
    """
    left = iter(blocks)
    sides = [[next(left).slice(piece.start, piece.rows) for piece in some] for some in pieces]
    tables = [pa.concat_tables(side, promote_options="permissive") for side in sides]
    return _finish(_table_of(Zip(tuple(Read(arrow_source(table)) for table in tables)), options))


class AddSortKeys:
    """Gives rows columns that any sort puts in our order: whether a value is null, whether it is NaN, the value."""

    def __init__(self, by: Sequence[str], nulls: Literal["first", "last"]) -> None:
        self._by = tuple(by)
        self._nulls = nulls

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        if not len(block):
            return
        for number, name in enumerate(self._by):
            values = _carried(block.column(name))
            null, nan, value = sort_keys(number)
            missing = values.is_null()
            last = missing if self._nulls == "last" else pc.call_function("invert", [missing])
            is_float = pa.types.is_floating(values.type)
            odd = values.is_nan().fill_null(False) if is_float else pa.repeat(pa.scalar(False), len(block))
            if is_float:
                values = pc.call_function("if_else", [odd, pa.scalar(0.0, values.type), values])
            block = block.append_column(null, last.cast(pa.int8()))
            block = block.append_column(nan, odd.cast(pa.int8()))
            block = block.append_column(value, _without_nulls(values))
        yield block


def sort_keys(number: int) -> tuple[str, str, str]:
    """Names of the columns that stand for a column of a sort."""
    return f"\0null{number}", f"\0nan{number}", f"\0value{number}"


def _without_nulls(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """With the same value for every null, in every block."""
    kind = values.type
    if pa.types.is_null(kind):
        return pa.chunked_array([pa.repeat(pa.scalar(0), len(values))])
    return values.fill_null(
        pa.scalar(b"" if pa.types.is_binary(kind) else "" if pa.types.is_string(kind) else 0).cast(kind)
    )


def _carried(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In the types of which Ray can sort and Python compare."""
    kind = carried_type(column.type) or column.type
    return column if column.type == kind else column.cast(kind)


def _stable_hash(value: Any) -> int:
    """Equal for equal values, in every process."""
    if isinstance(value, str):
        return zlib.crc32(value.encode())
    if isinstance(value, bytes):
        return zlib.crc32(value)
    if isinstance(value, Mapping):
        return _stable_hash(tuple(value.values()))
    if isinstance(value, list | tuple):
        number = 0
        for one in value:
            number = (number * 31 + _stable_hash(one)) & 0xFFFFFFFF
        return number
    if value is None or value != value:  # NaN
        return 0
    if isinstance(value, int | float | decimal.Decimal):  # which have one hash if they are equal
        return hash(value) & 0xFFFFFFFF
    return zlib.crc32(str(value).encode())


def _side(group: pa.Table, side: int) -> pa.Table:
    tables: list[pa.Table] = []
    for encoded in group.filter(pc.field(_SIDE) == side).sort_by(_PLACE).column(_ROWS).to_pylist():
        with pa.ipc.open_stream(encoded) as reader:
            tables.append(reader.read_all())
    return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})


def _encoded(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast("bytes", sink.getvalue().to_pybytes())


def _if_any(table: pa.Table) -> Iterator[pa.Table]:
    """No block, rather than one without rows, whose types nobody knows."""
    if len(table):
        yield table


async def _blocks(table: pa.Table) -> AsyncIterator[pa.RecordBatch]:
    for batch in table.to_batches():
        yield batch


async def _collect(blocks: Any) -> pa.Table:
    gathered = [block async for block in blocks]
    return pa.Table.from_batches(gathered) if gathered else pa.table({})


#: Blocks that one of Ray's tasks has, as a power of two; the rest of 63 bits numbers the tasks.
_TASK_BITS: Final = 32
#: Outside of Ray's tasks; no other process begins there.
_outside: Final = count(secrets.randbits(30))


def _place() -> tuple[int, int]:
    """The number of Ray's task, and of this call in it: where order is kept, blocks have that of their places."""
    from ray.data._internal.execution.interfaces import TaskContext

    context = TaskContext.get_current()
    if context is None:
        return 0, next(_outside)
    return int(context.task_idx), next(context.kwargs.setdefault("arun.calls", count()))


async def _table_of(node: Node, options: RunOptions) -> pa.Table:
    """All rows of a node that reads blocks which are here."""
    (table,), _ = await run_plan(lower(Plan([node])), [consumers.to_table], options)
    return table


def _finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on this process's event loop."""

    async def run() -> T:
        await start_attached()
        return await work

    return asyncio.run_coroutine_threadsafe(run(), _loop()).result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="arun dataset", daemon=True).start()
    return loop
