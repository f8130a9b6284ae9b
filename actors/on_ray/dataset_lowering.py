"""From the nodes of a plan to datasets of Ray Data. All of it blocks: what is shared or counted is computed here.

Order is kept, as the local executor keeps it: Ray Data is told to, and the rows that a shuffle moves know their place.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec
import pyarrow as pa

from actors.on_ray.dataset_worker import (
    BUCKET,
    ActorSteps,
    AddSortKeys,
    Combine,
    CrossJoin,
    HeldTo,
    Mark,
    Piece,
    Steps,
    WriteParts,
    nothing,
    read_fragment,
    rows_of,
    schema_of,
    sort_keys,
    zipped,
)
from actors.on_ray.ray_host import import_ray
from arun.data.all_to_all import Aggregate, Distinct, Join, RandomShuffle, Repartition, Sort
from arun.data.block import unify
from arun.data.engines import ActorCall
from arun.data.interchange import StreamingSource, TableSource
from arun.data.logical import AllToAll, Node, OneToOne, Plan, Read, Union, Write, Zip
from arun.data.options import RunOptions
from arun.data.source import Source
from arun.data.sources import RowSource
from arun.data.steps import Limit, RowFunction, Step
from arun.errors import MisuseError

if TYPE_CHECKING:
    import ray.data

__all__ = ("connect", "lower", "put")

#: Of a shuffle, for each of Ray's processes that put groups together.
_PARTITION_BYTES: Final = 64 << 20


def connect() -> None:
    """Ray as this process is connected to it, or as Ray Data would start it."""
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)


def put(batch: pa.RecordBatch) -> Any:
    """A batch in Ray's object store."""
    return import_ray().put(pa.Table.from_batches([batch]))


def lower(
    node: Node,
    plan: Plan,
    options: RunOptions,
    made: dict[int, ray.data.Dataset],
    iterated: Mapping[int, Sequence[Any]],
) -> ray.data.Dataset:
    """The Ray dataset of a node; what several nodes read is computed now, once.

    :param made: by node, what there is already; added to.
    :param iterated: by node, the blocks of iterables.
    """
    options = msgspec.structs.replace(options, progress=None, rules=None)  # which are this process's
    with _context():
        for one in plan.nodes:  # inputs first, and not by recursion: a chain may be long
            if one.id in iterated:
                made[one.id] = _of_refs(iterated[one.id])
            elif one.id not in made:
                dataset = _lower_one(one, [made[below.id] for below in one.inputs], options)
                made[one.id] = dataset.materialize() if plan.consumers(one) > 1 else dataset
            if one is node:
                break
    return made[node.id]


@contextmanager
def _context() -> Generator[None]:
    """The context of datasets that are made meanwhile, in this thread; they keep it."""
    import ray.data

    current = ray.data.DataContext.get_current()
    context = current.copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    ray.data.DataContext._set_current(context)
    try:
        yield
    finally:
        ray.data.DataContext._set_current(current)


def _lower_one(node: Node, inputs: Sequence[ray.data.Dataset], options: RunOptions) -> ray.data.Dataset:
    match node:
        case Read():
            return _read(node.source)
        case OneToOne():
            return _steps(node.steps, inputs[0], options)
        case AllToAll():
            return _barrier(node, inputs, options)
        case Union():  # Ray's own takes a block of each input in turn
            return _of_refs([block for one in inputs for block in _blocks(one.materialize())])
        case Zip():
            return _zip(inputs, options)
        case Write():
            return _map(_whole(inputs[0], node), WriteParts(node.sink))
        case _:
            raise AssertionError(f"{node.label} was iterated over, or refused before")


def _map(dataset: ray.data.Dataset, function: Any) -> ray.data.Dataset:
    return dataset.map_batches(function.__call__, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def _of_refs(blocks: Sequence[Any]) -> ray.data.Dataset:
    import ray.data

    return ray.data.from_arrow_refs(list(blocks)) if blocks else ray.data.from_arrow(pa.table({}))


# Sources and steps.


def _read(source: Source) -> ray.data.Dataset:
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    if isinstance(source, StreamingSource) and isinstance(source.dataset, ray.data.Dataset):
        columns = source.columns
        return source.dataset if columns is None else source.dataset.select_columns(list(columns))
    fragments = list(source.fragments())
    if not fragments:
        schema = source.schema()
        return ray.data.from_arrow(pa.table({}) if schema is None else schema.empty_table())
    if isinstance(source, RowSource | TableSource):  # else all of its rows would go with each of its fragments
        return _of_refs([put(batch) for fragment in fragments for batch in source.read(fragment)])

    class Fragments(Datasource):  # type: ignore[misc]  # Ray has no types
        def estimate_inmemory_data_size(self) -> int | None:
            sizes = [fragment.size for fragment in fragments]
            return None if None in sizes else sum(size or 0 for size in sizes)

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            schema = source.schema()
            return [
                ReadTask(
                    partial(read_fragment, source, fragment),
                    BlockMetadata(num_rows=fragment.rows, size_bytes=fragment.size, exec_stats=None),
                    schema=schema,
                )
                for fragment in fragments
            ]

    return ray.data.read_datasource(Fragments(), override_num_blocks=len(fragments))


def _steps(steps: Sequence[Step], dataset: ray.data.Dataset, options: RunOptions) -> ray.data.Dataset:
    together: list[Step] = []
    for step in steps:
        if isinstance(step, Limit):
            dataset = _together(together, dataset, options).limit(step.rows)
        elif isinstance(step, RowFunction) and isinstance(step.function, ActorCall):
            dataset = _in_actors(step, step.function, _together(together, dataset, options), options)
        else:
            together.append(step)
            continue
        together = []
    return _together(together, dataset, options)


def _together(steps: Sequence[Step], dataset: ray.data.Dataset, options: RunOptions) -> ray.data.Dataset:
    return _map(dataset, Steps(steps, options)) if steps else dataset


def _in_actors(step: RowFunction, call: ActorCall, dataset: ray.data.Dataset, options: RunOptions) -> ray.data.Dataset:
    """Each of Ray's actors has one of ours, for as long as it lives."""
    step = msgspec.structs.replace(step, function=_nothing)  # the cluster that the call names is of this process
    spawn = (call.cls, call.args, call.options)
    return dataset.map_batches(
        ActorSteps,
        fn_constructor_args=(step, spawn, call.method, call.in_flight, options),
        concurrency=call.replicas,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )


async def _nothing(row: Any) -> Any:
    raise AssertionError("the worker puts its actor in this place")


def _whole(dataset: ray.data.Dataset, node: Write) -> ray.data.Dataset:
    """One block, where a sink is one file."""
    return _settled(dataset).repartition(1) if node.sink.part_bytes is None else dataset


# All-to-all operations.


def _barrier(node: AllToAll, inputs: Sequence[ray.data.Dataset], options: RunOptions) -> ray.data.Dataset:
    dataset = inputs[0]
    match node.barrier:
        case Sort() as sort:
            return _sort(sort, _settled(dataset))
        case RandomShuffle(seed=seed):
            return _settled(dataset).random_shuffle(seed=seed)
        case Repartition(count=count) if count is not None:
            return _settled(dataset).repartition(count)
        case Repartition(rows=rows):
            return _settled(dataset).repartition(target_num_rows_per_block=rows)
        case Aggregate() as aggregate:
            used = {one.column for one in aggregate.aggregations.values() if one.column is not None}
            # Without keys there is one group also of no rows.
            no_rows = pa.table({}) if aggregate.keys else nothing(used)
            return _combined([_map(dataset, Mark(aggregate.keys))], Combine(aggregate, options), no_rows)
        case Distinct(by=by) as distinct:
            return _combined([_map(dataset, Mark(by))], Combine(distinct, options), pa.table({}))
        case Join(how="cross") as join:
            return _map(dataset, CrossJoin(join, _blocks(inputs[1].materialize()), options))
        case Join() as join:
            keys = join.on if isinstance(join.on, Mapping) else {k: k for k in _listed(join.on)}
            left = _map(dataset, Mark(tuple(keys), 0))
            right = _map(inputs[1], Mark(tuple(keys.values()), 1))
            return _combined([left, right], Combine(join, options), pa.table({}))
        case _:
            raise AssertionError(f"{node.label} was refused before")


def _listed(on: str | Sequence[str]) -> Sequence[str]:
    return (on,) if isinstance(on, str) else on


def _combined(marked: Sequence[ray.data.Dataset], combine: Combine, no_rows: pa.Table) -> ray.data.Dataset:
    """What comes of the groups; the blocks of a dataset without rows have no columns, which Ray can't group by."""
    import ray.data

    some = [one for one in (each.materialize() for each in marked) if one.count()]
    if not some:
        if not len(no_rows):
            return ray.data.from_arrow(no_rows)
        some = [ray.data.from_arrow(no_rows)]
    size = sum(one.size_bytes() for one in some)
    together = some[0].union(*some[1:]) if len(some) > 1 else some[0]
    cpus = int(import_ray().cluster_resources().get("CPU", 1))
    # Each partition is another process to start: no more of them than can run, nor than there are rows for.
    grouped = together.groupby(BUCKET, num_partitions=min(max(8, 2 * cpus), 1 + size // _PARTITION_BYTES))
    return grouped.map_groups(combine.__call__, batch_format="pyarrow")


def _sort(sort: Sort, dataset: ray.data.Dataset) -> ray.data.Dataset:
    if not dataset.count():  # blocks without rows have no columns to sort by
        return dataset
    down = [sort.descending] * len(sort.by) if isinstance(sort.descending, bool) else sort.descending
    keys: list[str] = []
    descending: list[bool] = []
    for number, one in enumerate(down):
        keys += sort_keys(number)
        descending += [False, one, one]  # null has its place in either direction
    return _map(dataset, AddSortKeys(sort.by, sort.nulls)).sort(keys, descending).drop_columns(keys)


def _settled(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """Computed, and of one schema: Ray's shuffles put blocks together that have the same one only."""
    computed = dataset.materialize()
    schemas = dict.fromkeys(_of_each(schema_of, _blocks(computed)))
    return _map(computed, HeldTo(unify(schemas))) if len(schemas) > 1 else computed


def _zip(inputs: Sequence[ray.data.Dataset], options: RunOptions) -> ray.data.Dataset:
    """As the blocks of the first input are cut, so are those of the others.

    :raises MisuseError: one has more rows than another.
    """
    blocks = [_blocks(one.materialize()) for one in inputs]
    rows = [_of_each(rows_of, some) for some in blocks]
    totals = [sum(one) for one in rows]
    if len(set(totals)) > 1:
        raise MisuseError(f"zip(): one side has more rows than another: {', '.join(map(str, totals))}")
    task = import_ray().remote(zipped)
    made: list[Any] = []
    start = 0
    for length in rows[0]:
        pieces = [list(_cut(one, start, start + length)) for one in rows]
        refs = [blocks[side][piece.block] for side, some in enumerate(pieces) for piece in some]
        made.append(task.remote(pieces, options, *refs))
        start += length
    return _of_refs(made)


def _cut(rows: Sequence[int], start: int, end: int) -> Iterator[Piece]:
    """The pieces of blocks that make up some rows."""
    first = 0
    for number, length in enumerate(rows):
        begin, stop = max(start, first), min(end, first + length)
        if begin < stop:
            yield Piece(number, begin - first, stop - begin)
        first += length


def _blocks(computed: ray.data.Dataset) -> list[Any]:
    """The blocks of a dataset that have rows, where they lie."""
    refs = computed.to_arrow_refs()
    return [ref for ref, rows in zip(refs, _of_each(rows_of, refs), strict=True) if rows]


def _of_each(function: Any, blocks: Sequence[Any]) -> list[Any]:
    """What a function says of each block, where it lies."""
    ray = import_ray()
    task = ray.remote(function)
    told: list[Any] = ray.get([task.remote(block) for block in blocks])
    return told
