"""Datasets on Ray Data: the same plan, lowered node by node.

========================  =====================================================================================
node                      on Ray Data
========================  =====================================================================================
Read                      a Datasource, a read task for each fragment; what is in memory goes to the object store
Iterate                   iterated over in this process, to its end, into the object store
OneToOne                  ``map_batches``: the local executor over a block; ``limit``; ``map_actor`` in Ray's actors
sort                      ``sort``, by columns in which null and NaN have their place
aggregate, distinct,      rows go to groups by their keys, ``groupby``; ``map_groups``: the local operation over a
join                      group, whose rows are put in their order again
cross join                ``map_batches``: each block with all blocks of the other side
random_shuffle,           the methods of these names
repartition
union, zip                all inputs are computed; of a zip, a task for each block of the first one
Write                     ``map_batches``: a part for each block
========================  =====================================================================================

A shared node is materialised, since Ray Data would run it once for each that reads it. Order is kept, as here, but for
equal rows of a sort. What only this process has is refused: a split, a cache that is not filled, an executor. Pools
cross by name, so they have to be detached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actors.on_ray.dataset_lowering import connect, lower, put
from actors.on_ray.dataset_refusals import refusal, shown_on_ray
from actors.on_ray.ray_host import import_ray
from arun.data.dataset import Dataset
from arun.data.execution.statistics import Statistics
from arun.data.logical import Iterate, Node, OneToOne, Plan, Write
from arun.data.options import RunOptions
from arun.data.running import Report
from arun.data.sink import Part
from arun.data.steps import Limit
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
        return [f"{node.label} -> {_told(node)}" for node in plan.nodes]

    async def run(self, plan: Plan, options: RunOptions) -> Sequence[Report]:
        """See :class:`~arun.data.backends.Backend`.

        :raises MisuseError: Ray Data can't do what a node asks for.
        """
        lowering = await _Lowering.of(plan, options)
        return [await _run(root, lowering) for root in plan.roots]

    async def collect(self, plan: Plan, options: RunOptions) -> list[pa.Table]:
        """The rows of every root, as tables."""
        lowering = await _Lowering.of(plan, options)
        tables: list[pa.Table] = []
        for root in plan.roots:
            gathered: list[pa.Table] = []
            await _iterate(await lowering.dataset(root), gathered.append)
            whole = [table for table in gathered if len(table)]
            tables.append(pa.concat_tables(whole, promote_options="permissive") if whole else pa.table({}))
        return tables


class _Lowering:
    """The Ray datasets of one run: what several roots read is computed once."""

    def __init__(self, plan: Plan, options: RunOptions, iterated: Mapping[int, Sequence[Any]]) -> None:
        self._plan = plan
        self._options = options
        self._iterated = iterated
        self._made: dict[int, ray.data.Dataset] = {}

    @classmethod
    async def of(cls, plan: Plan, options: RunOptions) -> _Lowering:
        """Look at all nodes, and iterate over what only this process can.

        :raises MisuseError: Ray Data can't do what a node asks for.
        """
        for node in plan.nodes:
            if (why := refusal(node)) is not None:
                raise MisuseError(f"{node.label} can't run with engine='ray': {why}")
        await run_in_thread(connect)
        iterated = {node.id: await _blocks_of(node, plan, options) for node in plan.nodes if isinstance(node, Iterate)}
        return cls(plan, options, iterated)

    async def dataset(self, node: Node) -> ray.data.Dataset:
        """That of a node; a sink is begun before."""
        if isinstance(node, Write):
            await run_in_thread(node.sink.begin)
        return await run_in_thread(partial(lower, node, self._plan, self._options, self._made, self._iterated))


def _told(node: Node) -> str:
    why = refusal(node)
    return shown_on_ray(node) if why is None else f"refused: {why}"


async def _blocks_of(node: Iterate, plan: Plan, options: RunOptions) -> list[Any]:
    """What an iterable gives, in Ray's object store; of an endless one what a limit right after it lets through."""
    rows = Dataset(node)
    readers = [one for one in plan.nodes if node in one.inputs]
    if plan.consumers(node) == 1 and readers and isinstance(readers[0], OneToOne):
        step = readers[0].steps[0]
        rows = rows.limit(step.rows) if isinstance(step, Limit) else rows
    async with rows.iter_batches(batch_size=options.block_rows, options=options) as batches:
        return [await run_in_thread(partial(put, batch)) async for batch in batches]


async def _run(root: Node, lowering: _Lowering) -> Report:
    began = time.perf_counter()
    dataset = await lowering.dataset(root)
    parts: list[Part] = []
    rows = 0

    def count(block: pa.Table) -> None:
        nonlocal rows
        rows += len(block)

    def note(block: pa.Table) -> None:
        parts.extend(Part(**row) for row in block.to_pylist())

    if isinstance(root, Write):
        await _iterate(dataset, note)
        if not parts and root.sink.part_bytes is None:
            parts.append(await run_in_thread(lambda: root.sink.part("part-00000").commit()))
        await run_in_thread(root.sink.end)
        rows = sum(part.rows for part in parts)
    else:
        await _iterate(dataset, count)
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
