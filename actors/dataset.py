"""Datasets on Ray Data: the same plan, lowered node by node.

========================  =====================================================================================
node                      on Ray Data
========================  =====================================================================================
Read                      a Datasource, a read task for each fragment
OneToOne                  ``map_batches``: the local executor over a block; ``limit``
sort                      ``sort``, by columns in which null and NaN have their place
aggregate, distinct,      rows go to groups by their keys, ``groupby``; ``map_groups``: the local operation over a
join                      group
random_shuffle,           the methods of these names
repartition, union
Write                     ``map_batches``: a part for each block
========================  =====================================================================================

A shared node is materialised, since Ray Data would run it once for each that reads it. Order is kept, as here, but for
equal rows of a sort. What depends on an order that a shuffle of Ray does not keep is refused, and so is what only this
process has: an iterable, a cache, a split. Pools cross by name, so they have to be detached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.on_ray.dataset_worker import (
    BUCKET,
    AddSortKeys,
    Combine,
    HeldTo,
    Mark,
    Steps,
    WriteParts,
    nothing,
    read_fragment,
    schema_of,
    sort_keys,
)
from actors.on_ray.ray_host import import_ray
from arun.data.all_to_all import Aggregate, Distinct, Join, RandomShuffle, Repartition, Sort
from arun.data.block import unify
from arun.data.execution.statistics import Statistics
from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Plan, Read, Union, Write, Zip
from arun.data.options import RunOptions
from arun.data.running import Report
from arun.data.sink import Part
from arun.data.source import Source
from arun.data.steps import BatchFunction, Limit, RowFunction, Step
from arun.errors import MisuseError
from arun.threads import run_in_thread, step_in_thread

if TYPE_CHECKING:
    import ray.data

__all__ = ("RayEngine",)


class RayEngine:
    """Runs datasets on Ray Data: ``await dataset.arun(engine="ray")``.

    On the Ray that this process is connected to, or, as Ray Data does, on one that it starts.
    """

    def explain(self, plan: Plan) -> Sequence[str]:
        """See :class:`~arun.data.backends.Backend`."""
        return [f"{node.label} -> {_refusal(node) or _shown(node)}" for node in plan.nodes]

    async def run(self, plan: Plan, options: RunOptions) -> Sequence[Report]:
        """See :class:`~arun.data.backends.Backend`.

        :raises MisuseError: Ray Data can't do what a node asks for.
        """
        for node in plan.nodes:
            if (why := _refusal(node)) is not None:
                raise MisuseError(f"{node.label} can't run with engine='ray': {why}")
        return [await _run(root, plan, options) for root in plan.roots]

    async def collect(self, plan: Plan, options: RunOptions) -> list[pa.Table]:
        """The rows of every root, as tables."""
        tables: list[pa.Table] = []
        made: dict[int, ray.data.Dataset] = {}
        for root in plan.roots:
            dataset = await run_in_thread(partial(_lower, root, plan, options, made))
            gathered: list[pa.Table] = []
            await _iterate(dataset, gathered.append)
            whole = [table for table in gathered if len(table)]
            tables.append(pa.concat_tables(whole, promote_options="permissive") if whole else pa.table({}))
        return tables


async def _run(root: Node, plan: Plan, options: RunOptions) -> Report:
    began = time.perf_counter()
    parts: list[Part] = []
    rows = 0

    def count(block: pa.Table) -> None:
        nonlocal rows
        rows += len(block)

    def note(block: pa.Table) -> None:
        parts.extend(Part(**row) for row in block.to_pylist())

    made: dict[int, ray.data.Dataset] = {}
    if isinstance(root, Write):
        await run_in_thread(root.sink.begin)
        written = await run_in_thread(partial(_lower, root, plan, options, made))
        await _iterate(written, note)
        await run_in_thread(root.sink.end)
        rows = sum(part.rows for part in parts)
    else:
        await _iterate(await run_in_thread(partial(_lower, root, plan, options, made)), count)
    return Report(rows, tuple(parts), Statistics((), time.perf_counter() - began))


async def _iterate(dataset: ray.data.Dataset, take: Callable[[pa.Table], None]) -> None:
    """Run it block by block; cancelled, it ends after the block that it is in."""

    async def receive(block: pa.Table) -> None:
        take(block)

    blocks = partial(dataset.iter_batches, batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        await step_in_thread(blocks, receive, label="Ray Data")
    except import_ray().exceptions.RayTaskError as exc:
        cause = getattr(exc, "cause", None)
        if isinstance(cause, Exception):
            raise cause from exc
        raise


# What can't be lowered.


def _refusal(node: Node) -> str | None:
    match node:
        case Iterate():
            return f"{node.items.name} is of this process alone; write its rows to files, or give a Source"
        case Zip():
            return "Ray Data keeps no order to zip by; join on a column"
        case OneToOne():
            return next((why for step in node.steps if (why := _step_refusal(step)) is not None), None)
        case AllToAll():
            return _barrier_refusal(node)
        case _:
            return None


def _step_refusal(step: Step) -> str | None:
    if isinstance(step, RowFunction | BatchFunction) and step.executor is not None:
        return f"{step.label} runs on {step.executor!r}, which is of this process; leave executor= out"
    return None


def _barrier_refusal(node: AllToAll) -> str | None:
    match node.barrier:
        case Aggregate() as aggregate:
            ordered = [name for name, one in aggregate.aggregations.items() if one.ordered]
            return (
                f"{ordered[0]!r} depends on the order of the rows, which a shuffle does not keep" if ordered else None
            )
        case Distinct(by=by) if by is not None:
            return "which of several rows stays depends on their order, which a shuffle does not keep"
        case Join(how="cross"):
            return "Ray Data has no cross join"
        case Sort() | Distinct() | Join() | RandomShuffle() | Repartition():
            return None
        case _:
            return f"Ray Data has no {type(node.barrier).__name__}"


def _shown(node: Node) -> str:
    match node:
        case Read():
            return "read_datasource"
        case OneToOne():
            return " + ".join(f"limit({s.rows})" if isinstance(s, Limit) else "map_batches" for s in node.steps)
        case AllToAll(barrier=Aggregate() | Distinct() | Join()):
            return "map_batches + groupby + map_groups"
        case AllToAll(barrier=Sort()):
            return "map_batches + sort"
        case AllToAll():
            return node.barrier.label
        case Union():
            return "union"
        case _:
            return "map_batches: a part a block"


# Lowering.


def _lower(node: Node, plan: Plan, options: RunOptions, made: dict[int, ray.data.Dataset]) -> ray.data.Dataset:
    """The Ray dataset of a node; what several nodes read is computed now."""
    ray = import_ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    with _context():
        for one in plan.nodes:  # inputs first, and not by recursion: a chain may be long
            if one.id not in made:
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
    cpus = int(import_ray().cluster_resources().get("CPU", 1))
    context.default_hash_shuffle_parallelism = min(context.default_hash_shuffle_parallelism, max(8, 2 * cpus))
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
        case Union():
            return inputs[0].union(*inputs[1:])
        case Write():
            return _map(_whole(inputs[0], node), WriteParts(node.sink))
        case _:
            raise AssertionError(f"{node.label} was refused before")


def _map(dataset: ray.data.Dataset, function: Any) -> ray.data.Dataset:
    return dataset.map_batches(function.__call__, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)


def _whole(dataset: ray.data.Dataset, node: Write) -> ray.data.Dataset:
    """One block, where a sink is one file."""
    return _settled(dataset).repartition(1) if node.sink.part_bytes is None else dataset


def _settled(dataset: ray.data.Dataset) -> ray.data.Dataset:
    """Computed, and of one schema: Ray's shuffles put blocks together that have the same one only."""
    computed = dataset.materialize()
    told = computed.map_batches(schema_of, batch_size=None, batch_format="pyarrow").take_all()
    schemas = dict.fromkeys(pa.ipc.read_schema(pa.py_buffer(row["schema"])) for row in told)
    return _map(computed, HeldTo(unify(schemas))) if len(schemas) > 1 else computed


def _steps(steps: Sequence[Step], dataset: ray.data.Dataset, options: RunOptions) -> ray.data.Dataset:
    together: list[Step] = []
    for step in steps:
        if isinstance(step, Limit):
            dataset = _together(together, dataset, options).limit(step.rows)
            together = []
        else:
            together.append(step)
    return _together(together, dataset, options)


def _together(steps: Sequence[Step], dataset: ray.data.Dataset, options: RunOptions) -> ray.data.Dataset:
    return _map(dataset, Steps(steps, options)) if steps else dataset


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
        case Distinct() as distinct:
            return _combined([_map(dataset, Mark(None))], Combine(distinct, options), pa.table({}))
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
    together = some[0].union(*some[1:]) if len(some) > 1 else some[0]
    return together.groupby(BUCKET).map_groups(combine.__call__, batch_format="pyarrow")


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


def _read(source: Source) -> ray.data.Dataset:
    import ray.data
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    fragments = list(source.fragments())
    if not fragments:
        schema = source.schema()
        return ray.data.from_arrow(pa.table({}) if schema is None else schema.empty_table())

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
