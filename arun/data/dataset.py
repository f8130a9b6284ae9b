"""Dataset: a lazy, immutable plan of steps over rows, and the ways to run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from arun.data import consumers
from arun.data.backends import Backend, backend_of
from arun.data.batches import BatchFormat as TrainFormat
from arun.data.block import Row
from arun.data.cache import Cache
from arun.data.checkpoint.running import run_with_checkpoint
from arun.data.declare import at_least
from arun.data.execution.execution import Consumer
from arun.data.execution.statistics import Statistics
from arun.data.explain import as_mermaid, as_text
from arun.data.interchange import to_huggingface, to_pandas, to_ray
from arun.data.items import Items
from arun.data.known import known_count, known_schema
from arun.data.logical import Iterate, Node, OneToOne, Plan, Write
from arun.data.operations import Operations
from arun.data.options import RunOptions
from arun.data.physical import lower
from arun.data.running import Report, plan_of, run_plan
from arun.data.split import Splits
from arun.data.steps import Limit, Select
from arun.data.stream import BatchStream, BlockStream, RowStream
from arun.errors import MisuseError
from arun.threads import run_in_thread

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("Dataset", "run")


class Dataset(Operations):
    """Rows that are computed when they are asked for.

    Every method but those that run it returns another Dataset, and costs nothing. Running it again computes again.

    >>> evens = from_rows([{"n": n} for n in range(10)]).filter(lambda row: row["n"] % 2 == 0)
    >>> await evens.take(2)
    [{'n': 0}, {'n': 2}]

    :ivar node: the plan that it stands for.
    """

    __slots__ = ("_statistics",)

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._statistics: Statistics | None = None

    def __repr__(self) -> str:
        return f"<Dataset {self.node.label:.80}>"

    def __iter__(self) -> Any:
        raise MisuseError(
            "a Dataset is async: `async for block in dataset`, `async for row in dataset.rows()`, or "
            "`await dataset.collect()`"
        )

    # -- shared ---------------------------------------------------------------------------------------------

    def split(
        self,
        consumers: int,
        *,
        equal: bool = False,
        by: str | Sequence[str] = (),
        options: RunOptions | None = None,
    ) -> tuple[Dataset, ...]:
        """Datasets that share one run of this one, for tasks that read them side by side, each at its own speed.

        The next block goes to whoever asks for it. It is done when its reader asks for the next one; if the reader
        leaves before that, another one gets it, so every row is seen at least once, and the end comes when all blocks
        are done. That holds for who iterates over a split, also through steps that run in one stage; what waits between
        stages after the split counts as done. Each reader's n-th iteration shares the n-th run.

        :param equal: all get as many rows, settled beforehand; the less than ``consumers`` that are over at the end are
            left out. What a reader has not fetched yet waits in memory or on disk.
        :param by: columns; rows that have the same values in them go to the same reader, settled as with ``equal``.
        :param options: of the shared run.
        """
        settings = options or RunOptions()
        self._readable()
        blocks = partial(self.astream, settings)
        splits = Splits(blocks, consumers, equal=equal, by=by, memory=settings.memory_limit, folder=settings.folder)
        return tuple(Dataset(Iterate(Items(part))) for part in splits.parts())

    def cache(self, *, memory: int | None = None, options: RunOptions | None = None) -> Dataset:
        """The same rows, computed by the first run and kept for the next ones; runs at the same time share them.

        Kept for as long as a dataset refers to them. A first run that does not come to its end leaves nothing.

        :param memory: bytes to keep in memory, the rest is on disk; by default the memory limit of the options. 0: all
            of it is on disk.
        :param options: of the run that computes them.
        """
        settings = options or RunOptions()
        limit = settings.memory_limit if memory is None else at_least("cache", "memory", memory, 0)
        name, blocks = self._readable().label, partial(self.astream, settings)
        kept = Cache(blocks, memory=limit, folder=settings.folder, name=name)
        return Dataset(Iterate(Items(kept)))

    # -- running --------------------------------------------------------------------------------------------

    async def arun(
        self,
        options: RunOptions | None = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        engine: str | Backend = "local",
    ) -> Report:
        """Run it to its end: write to its sink, or, without one, compute the rows and let go of them.

        In the caller's task, so its timeouts and cancellation reach everything.

        :param checkpoint: a folder on a local disk that keeps what is finished. If the process is killed, the same call
            goes on: every row is in the output once, and only rows that had not reached the sink are computed again.
            For plans from files to files, of steps that take one row or batch at a time; ``explain()`` tells.
        :param engine: "local", or "ray": on Ray Data, see ``actors.dataset``.
        :raises MisuseError: the plan can't have a checkpoint; names the step.
        :raises CheckpointError: the checkpoint is of another plan or input, or another process uses it.
        :raises Exception: the first error of a function, a source or the sink, with a note that names step and row.
        :raises MisuseError: the engine can't run one of its steps; raised before anything runs.
        """
        if checkpoint is None:
            return (await run(self, options=options, engine=engine))[0]
        if engine != "local":
            raise MisuseError("a checkpoint is kept by engine='local' only; leave one of the two out")
        report = await run_with_checkpoint(self.node, Path(checkpoint), options or RunOptions())
        self._statistics = report.statistics
        return report

    def astream(self, options: RunOptions | None = None) -> BlockStream:
        """Run it, and iterate over its blocks, ``pyarrow.RecordBatch``, as they come."""
        self._readable()
        settings = options or RunOptions()
        on_demand = any(isinstance(node, Iterate) and node.items.on_demand for node in Plan([self.node]).nodes)
        return BlockStream(lambda consumer: self._run(self.node, consumer, settings), settings, on_demand=on_demand)

    def __aiter__(self) -> BlockStream:
        return self.astream()

    def rows(self, options: RunOptions | None = None) -> RowStream:
        """Run it, and iterate over its rows, dicts, as they come."""
        return RowStream(self.astream(options))

    async def collect(self, options: RunOptions | None = None) -> pa.Table:
        """Run it, and return all rows as a ``pyarrow.Table``."""
        table = await self._run(self._readable(), consumers.to_table, options)
        if table.num_rows or table.num_columns:
            return table
        known = await run_in_thread(partial(known_schema, self.node))
        return table if known is None else known.empty_table()

    async def to_pandas(self, options: RunOptions | None = None) -> Any:
        """Run it, and return all rows as a ``pandas.DataFrame``."""
        return await run_in_thread(partial(to_pandas, await self.collect(options)))

    async def to_huggingface(self, options: RunOptions | None = None) -> Any:
        """Run it, and return all rows as a ``datasets.Dataset`` over the same memory."""
        return await run_in_thread(partial(to_huggingface, await self.collect(options)))

    async def to_ray(self, options: RunOptions | None = None) -> Any:
        """Run it, and return all rows as a ``ray.data.Dataset``, in Ray's object store."""
        return await run_in_thread(partial(to_ray, await self.collect(options)))

    def iter_batches(
        self,
        *,
        format: TrainFormat = "arrow",
        batch_size: int | None = 256,
        drop_last: bool = False,
        options: RunOptions | None = None,
    ) -> BatchStream:
        """Run it, and iterate over batches for a trainer: ``async for batch in dataset.iter_batches(format="torch")``.

        :param format: record batches; dicts of NumPy arrays, which can't be written to; of PyTorch tensors, which can;
            or data frames.
        :param batch_size: rows of each but the last; None: blocks as they come.
        :param drop_last: leave the last batch out where it is smaller.
        """
        return BatchStream(self.astream(options), format, batch_size, drop_last=drop_last)

    async def take(self, rows: int = 20, options: RunOptions | None = None) -> list[Row]:
        """The first rows, as dicts of the same columns. Reads and computes no more than it must for them."""
        limited = OneToOne((Limit(at_least("take", "rows", rows, 0)),), self._readable())
        return cast("list[Row]", await self._run(limited, consumers.take, options))

    async def count(self, options: RunOptions | None = None) -> int:
        """How many rows there are: by what the sources know, where that tells, else by running it without columns."""
        bare = OneToOne((Select(()),), self._readable())
        known = await run_in_thread(partial(known_count, self.node))
        return known if known is not None else cast("int", await self._run(bare, consumers.count, options))

    async def schema(self, options: RunOptions | None = None) -> pa.Schema | None:
        """Its columns: by what the sources know, where that tells, else by running it up to its first block.

        :return: None if there are neither rows nor anybody who knows.
        """
        self._readable()
        known = await run_in_thread(partial(known_schema, self.node))
        return known if known is not None else await self._run(self.node, consumers.first_schema, options)

    # -- looking at it ----------------------------------------------------------------------------------------

    def explain(
        self,
        options: RunOptions | None = None,
        *,
        format: Literal["text", "mermaid"] = "text",
        engine: str | Backend = "local",
    ) -> str:
        """What would run: the plan as it was asked for, what the rules make of it, and its stages. Runs nothing.

        :param format: "text", or "mermaid": the stages as a flowchart.
        :param engine: where it would run; of another than "local": what that makes of each node, or why it can't.
        """
        if format not in {"text", "mermaid"}:
            raise MisuseError(f"explain(format={format!r}): takes 'text' or 'mermaid'")
        logical = Plan([self.node])
        optimised = plan_of(logical.roots, options or RunOptions())
        elsewhere = backend_of(engine)
        if elsewhere is not None:
            return "\n".join(elsewhere.explain(optimised))
        physical = lower(optimised)
        return as_mermaid(physical) if format == "mermaid" else as_text(logical, optimised, physical)

    def stats(self) -> Statistics:
        """What the last run of this very dataset that has ended did, by stage and step.

        :raises MisuseError: there was none.
        """
        if self._statistics is None:
            raise MisuseError("this dataset was not run yet; explain() tells what would run")
        return self._statistics

    async def _run(self, node: Node, consumer: Consumer, options: RunOptions | None) -> Any:
        settings = options or RunOptions()
        physical = lower(plan_of([node], settings))
        (result,), self._statistics = await run_plan(physical, [consumer], settings)
        return result


async def run(*datasets: Dataset, options: RunOptions | None = None, engine: str | Backend = "local") -> list[Report]:
    """Run several datasets as one: what they share runs once.

    >>> rows = read_jsonl("in.jsonl").map(parse)
    >>> await run(rows.filter(good).write_parquet("good/"), rows.filter(bad).write_jsonl("bad/"))

    :raises Exception: the first error of any of them; the others are cancelled.
    """
    settings = options or RunOptions()
    plan = plan_of([dataset.node for dataset in datasets], settings)
    elsewhere = backend_of(engine)
    if elsewhere is not None:
        return list(await elsewhere.run(plan, settings))
    physical = lower(plan)
    results, statistics = await run_plan(physical, [None] * len(datasets), settings)
    reports: list[Report] = []
    for dataset, result in zip(datasets, results, strict=True):
        dataset._statistics = statistics
        parts = tuple(result) if isinstance(dataset.node, Write) else None
        rows = result if parts is None else sum(part.rows for part in parts)
        reports.append(Report(rows, parts or (), statistics))
    return reports
