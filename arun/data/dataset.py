"""Dataset: a lazy, immutable plan of steps over rows, and the ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import msgspec
import pyarrow.compute as pc

from arun.data import consumers
from arun.data.all_to_all import Distinct, Join, RandomShuffle, Repartition, Sort
from arun.data.backends import Backend, backend_of
from arun.data.barriers import How
from arun.data.batches import BatchFormat as TrainFormat
from arun.data.block import Row
from arun.data.cache import Cache
from arun.data.checkpoint.running import run_with_checkpoint
from arun.data.declare import BatchOptions, RowOptions, SinkOptions, at_least, batch_function, names, row_function
from arun.data.engines import ActorCall, Ask, Cluster, Embed, Embedder, Engine, PromptOf, prefix_of
from arun.data.execution.execution import Consumer
from arun.data.explain import as_mermaid, as_text
from arun.data.files import batch_sink, csv_sink, ipc_sink, jsonl_sink, parquet_sink
from arun.data.grouped import Grouped
from arun.data.interchange import to_huggingface, to_pandas, to_ray
from arun.data.items import Items
from arun.data.known import known_count, known_schema
from arun.data.logical import AllToAll, Barrier, Iterate, Node, OneToOne, Plan, Union, Write, Zip
from arun.data.options import RunOptions
from arun.data.physical import lower
from arun.data.running import Report, Statistics, plan_of, run_plan
from arun.data.sink import Sink
from arun.data.split import Splits
from arun.data.steps import Drop, Expression, Limit, Rename, Select, Step, Where
from arun.data.stream import BatchStream, BlockStream, RowStream
from arun.errors import MisuseError
from arun.threads import run_in_thread

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("Dataset", "run")


class Dataset:
    """Rows that are computed when they are asked for.

    Every method but those that run it returns another Dataset, and costs nothing. Running it again computes again.

    >>> evens = from_rows([{"n": n} for n in range(10)]).filter(lambda row: row["n"] % 2 == 0)
    >>> await evens.take(2)
    [{'n': 0}, {'n': 2}]

    :ivar node: the plan that it stands for.
    """

    __slots__ = ("_statistics", "node")

    def __init__(self, node: Node) -> None:
        self.node = node
        self._statistics: Statistics | None = None

    def __repr__(self) -> str:
        return f"<Dataset {self.node.label:.80}>"

    def __iter__(self) -> Any:
        raise MisuseError(
            "a Dataset is async: `async for block in dataset`, `async for row in dataset.rows()`, or "
            "`await dataset.collect()`"
        )

    # -- one-to-one ---------------------------------------------------------------------------------------

    def map(self, function: Callable[[Row], Any], **options: Unpack[RowOptions]) -> Dataset:
        """A row for each row: what a function returns; a generator gives any number of rows, as with ``flat_map``.

        :param function: given a row, a dict that it may change; returns a dict. Plain or async.
        :param options: see :class:`~arun.data.declare.RowOptions`.
        """
        return self._then(row_function("map", function, options))

    def flat_map(self, function: Callable[[Row], Any], **options: Unpack[RowOptions]) -> Dataset:
        """Any number of rows for each row.

        :param function: given a row; returns an iterable of rows, or is a generator. Plain or async.
        :param options: see :class:`~arun.data.declare.RowOptions`.
        """
        return self._then(row_function("flat_map", function, options))

    def filter(self, condition: Callable[[Row], Any] | pc.Expression, **options: Unpack[RowOptions]) -> Dataset:
        """The rows for which a condition holds.

        :param condition: a function of a row, plain or async; or an Arrow expression such as
            ``pyarrow.compute.field("n") > 3``, which is much faster, and which some sources need not read rows for.
        :param options: of a function; see :class:`~arun.data.declare.RowOptions`.
        """
        if isinstance(condition, pc.Expression):
            self._no_options("filter", options)
            return self._then(Where(condition))
        return self._then(row_function("filter", condition, options))

    def with_column(
        self, name: str, value: Callable[[Row], Any] | pc.Expression, **options: Unpack[RowOptions]
    ) -> Dataset:
        """One more column, or another one in its place.

        :param value: a function of a row, plain or async, or an Arrow expression.
        :param options: of a function; see :class:`~arun.data.declare.RowOptions`.
        """
        if isinstance(value, pc.Expression):
            self._no_options("with_column", options)
            return self._then(Expression(name, value))
        return self._then(row_function("with_column", value, options, name))

    def map_batches(self, function: Callable[[Any], Any], **options: Unpack[BatchOptions]) -> Dataset:
        """What a function makes of each batch of rows.

        :param function: given a batch; returns one, or is a generator of some. Plain or async.
        :param options: see :class:`~arun.data.declare.BatchOptions`.
        """
        return self._then(batch_function(function, options))

    def generate(
        self,
        engine: Engine,
        *,
        prompt: PromptOf = "prompt",
        output: str = "answer",
        fields: type | None = None,
        by_prefix: bool = True,
        rows: RowOptions | None = None,
        **options: Any,
    ) -> Dataset:
        """Each row with an engine's answer to its prompt, and why it ended and the tokens that it took beside it.

        >>> dataset.generate(pool, prompt="question", max_tokens=64, rows={"on_error": "collect"})

        :param engine: an :class:`~actors.EnginePool`, or anything with such a ``complete``.
        :param prompt: a column, or a function of a row: text or token ids.
        :param output: column of the answer, ``{output}_finish_reason`` and so on.
        :param fields: a msgspec Struct, dataclass, TypedDict or pydantic model: the answer is JSON of it, and its
            fields become columns.
        :param by_prefix: whether rows whose prompts begin alike are sent together, to the replica that knows that
            beginning.
        :param rows: see :class:`~arun.data.RowOptions`; by default as many rows at a time as the engine takes.
        :param options: for ``complete``, such as ``max_tokens`` and ``temperature``; the lane is ``"batch"``.
        """
        return self._ask(Ask(engine, prompt, output, options, fields=fields), "generate", by_prefix, rows)

    def chat(
        self,
        engine: Engine,
        *,
        messages: PromptOf = "messages",
        system: str | None = None,
        output: str = "answer",
        fields: type | None = None,
        by_prefix: bool = True,
        rows: RowOptions | None = None,
        **options: Any,
    ) -> Dataset:
        """As :meth:`generate`, for chat messages.

        :param messages: a column, or a function of a row: ``[{"role": ..., "content": ...}]``, or what the user says.
        :param system: a message before them.
        """
        ask = Ask(engine, messages, output, options, fields=fields, chat=True, system=system)
        return self._ask(ask, "chat", by_prefix, rows)

    def embed(
        self,
        engine: Embedder,
        *,
        prompt: PromptOf = "text",
        output: str = "embedding",
        rows: RowOptions | None = None,
        **options: Any,
    ) -> Dataset:
        """Each row with the vector of a text, a list of float32, and ``{output}_prompt_tokens``.

        :param prompt: a column, or a function of a row.
        :param options: for the engine's ``embed``, such as ``dimensions``.
        """
        return self._ask(Embed(engine, prompt, output, options), "embed", False, rows)

    def map_actor(
        self,
        cluster: Cluster,
        cls: type[Any],
        method: str,
        *args: Any,
        replicas: int = 1,
        in_flight: int = 1,
        rows: RowOptions | None = None,
        **options: Any,
    ) -> Dataset:
        """A row for each row: what a method of an actor returns. The actors live as long as the run.

        :param cls: an actor's class; ``cls(*args)`` is started ``replicas`` times.
        :param method: given a row; returns a row.
        :param in_flight: most rows that one actor has at a time.
        :param options: of ``cluster.spawn``, or further arguments of the class.
        """
        at_least("map_actor", "replicas", replicas, 1)
        at_least("map_actor", "in_flight", in_flight, 1)
        call = ActorCall(cluster, cls, method, args=args, options=options, replicas=replicas, in_flight=in_flight)
        title = f"map_actor({cls.__name__}.{method})"
        return self._then(msgspec.structs.replace(row_function("map", call, rows or {}), title=title))

    def select(self, *columns: str) -> Dataset:
        """These columns only, in this order."""
        return self._then(Select(names("select", columns)))

    def drop(self, *columns: str) -> Dataset:
        """All columns but these."""
        return self._then(Drop(names("drop", columns)))

    def rename(self, columns: Mapping[str, str]) -> Dataset:
        """Other names for columns.

        :param columns: old to new.
        """
        names("rename", tuple(columns.values()))
        return self._then(Rename(dict(columns)))

    def limit(self, rows: int) -> Dataset:
        """The first rows; what is not needed for them is not computed."""
        return self._then(Limit(at_least("limit", "rows", rows, 0)))

    # -- all-to-all ------------------------------------------------------------------------------------------

    def sort(
        self,
        *by: str,
        descending: bool | Sequence[bool] = False,
        nulls: Literal["first", "last"] = "last",
    ) -> Dataset:
        """All rows in order; equal ones in the order in which they came. On DuckDB; spills to disk.

        :param by: columns, the most significant first.
        :param descending: for all of them, or one for each.
        :param nulls: where null goes, in either direction. NaN is above every other number.
        """
        directions = descending if isinstance(descending, bool) else tuple(descending)
        if not isinstance(directions, bool) and len(directions) != len(by):
            raise MisuseError(
                f"sort() by {len(by)} columns in {len(directions)} directions; give one for each, or for all"
            )
        return self._all_to_all(Sort(names("sort", by), directions, nulls))

    def group_by(self, *keys: str) -> Grouped:
        """The rows with equal keys as groups, to be aggregated: ``group_by("lang").aggregate(rows="count")``.

        :param keys: columns; none of them: all rows are one group.
        """
        return Grouped(self, keys)

    def distinct(self, *by: str) -> Dataset:
        """Each row once, in no particular order. On DuckDB; spills to disk.

        :param by: columns in which rows have to differ; of equal ones the first to come stays. By default all.
        """
        return self._all_to_all(Distinct(names("distinct", by) if by else None))

    def join(
        self,
        other: Dataset,
        on: str | Sequence[str] | Mapping[str, str] = (),
        how: How = "inner",
        *,
        suffix: str = "_right",
    ) -> Dataset:
        """Rows of this one with the rows of another that have equal keys, in no particular order. On DuckDB; spills.

        A null key equals nothing. The columns are those of this one, then those of the other without its keys.

        :param on: columns of both; or a mapping from one of this to one of the other. None for a cross join.
        :param how: "inner", "left", "right", "outer", "cross"; "semi" and "anti" give the rows with or without a match.
        :param suffix: what a column of the other gets whose name is taken.
        """
        keys = on if isinstance(on, str | Mapping) else tuple(on)
        if bool(keys) == (how == "cross"):
            raise MisuseError(
                f"join(how={how!r}) takes {'no columns' if keys else 'the columns to join on'}: on={on!r}"
            )
        return Dataset(AllToAll(Join(keys, how, suffix), (self._readable(), other._readable())))

    def random_shuffle(self, *, seed: int | None = None) -> Dataset:
        """All rows in a random order, each order as likely as any other. Spills to disk.

        :param seed: the same one gives the same rows the same order; None for another one in every run.
        """
        return self._all_to_all(RandomShuffle(seed))

    def repartition(self, count: int | None = None, *, rows: int | None = None) -> Dataset:
        """The same rows in the same order, in other blocks.

        :param count: number of blocks, whose rows differ by one at most. All rows have to be there before the first.
        :param rows: in each block but the last; the rows stream.
        """
        if (count is None) == (rows is None):
            raise MisuseError("repartition() takes a count of blocks or the rows of each; give one of them")
        at_least("repartition", "rows" if count is None else "count", cast("int", rows if count is None else count), 1)
        return self._all_to_all(Repartition(count, rows))

    # -- several datasets ----------------------------------------------------------------------------------

    def union(self, *others: Dataset) -> Dataset:
        """The rows of this one, then those of the others."""
        return Dataset(Union(tuple(one._readable() for one in (self, *others))))

    def zip(self, *others: Dataset) -> Dataset:
        """The columns of this one and of others of as many rows, side by side; a name that is taken gets a number."""
        return Dataset(Zip(tuple(one._readable() for one in (self, *others))))

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

    # -- sinks ----------------------------------------------------------------------------------------------

    def write_parquet(
        self,
        path: str | PathLike[str],
        *,
        row_group_bytes: int = 32 << 20,
        compression: str = "zstd",
        **to: Unpack[SinkOptions],
    ) -> Dataset:
        """A dataset that writes Parquet files when it is run.

        :param path: a file that ends in ``.parquet``, or a folder for parts; a URL of either.
        :param row_group_bytes: of Arrow memory that make one row group.
        :param compression: "zstd", "snappy", "gzip", "lz4", "brotli" or "none".
        :param to: see :class:`SinkOptions`.
        """
        return self.write(parquet_sink(path, row_group_bytes=row_group_bytes, compression=compression, **to))

    def write_jsonl(self, path: str | PathLike[str], **to: Unpack[SinkOptions]) -> Dataset:
        """A dataset that writes one JSON object a line when it is run.

        :param path: a file, compressed if it ends in ``.gz``, ``.zst`` and so on, or a folder for parts; or a URL.
        :param to: see :class:`SinkOptions`.
        """
        return self.write(jsonl_sink(path, **to))

    def write_csv(self, path: str | PathLike[str], *, delimiter: str = ",", **to: Unpack[SinkOptions]) -> Dataset:
        """A dataset that writes CSV with a header when it is run; paths as for :meth:`write_jsonl`.

        :param to: see :class:`SinkOptions`.
        """
        return self.write(csv_sink(path, delimiter=delimiter, **to))

    def write_ipc(self, path: str | PathLike[str], *, compression: str = "none", **to: Unpack[SinkOptions]) -> Dataset:
        """A dataset that writes Arrow IPC files (Feather 2) when it is run.

        :param path: a file that ends in ``.arrow``, or a folder for parts; a URL of either.
        :param compression: "zstd", "lz4" or "none".
        :param to: see :class:`SinkOptions`.
        """
        return self.write(ipc_sink(path, compression=compression, **to))

    def write_openai_batch(self, path: str | PathLike[str], **to: Unpack[SinkOptions]) -> Dataset:
        """A dataset that writes results as OpenAI's batch API gives them, when it is run.

        Of the columns ``custom_id`` must be there; ``body`` and ``error`` are JSON as text, or structs.

        :param to: see :class:`SinkOptions`.
        """
        return self.write(batch_sink(path, **to))

    def write(self, sink: Sink) -> Dataset:
        """A dataset that, when it is run, writes these rows.

        :param sink: where to; see :class:`~arun.data.sink.Sink`.
        """
        return Dataset(Write(sink, self._readable()))

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
        :param engine: "local", or "ray": on Ray Data, see :mod:`actors.dataset`.
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
        return await self._run(self._readable(), consumers.to_table, options)

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

        :param format: record batches; dicts of NumPy arrays or of PyTorch tensors; or data frames.
        :param batch_size: rows of each but the last; None: blocks as they come.
        :param drop_last: leave the last batch out where it is smaller.
        """
        return BatchStream(self.astream(options), format, batch_size, drop_last=drop_last)

    async def take(self, rows: int = 20, options: RunOptions | None = None) -> list[Row]:
        """The first rows, as dicts. Reads and computes no more than it must for them."""
        limited = OneToOne((Limit(at_least("take", "rows", rows, 0)),), self._readable())
        return cast("list[Row]", await self._run(limited, consumers.take, options))

    async def count(self, options: RunOptions | None = None) -> int:
        """How many rows there are: by what the sources know, where that tells, else by running it."""
        self._readable()
        known = await run_in_thread(partial(known_count, self.node))
        return known if known is not None else cast("int", await self._run(self.node, consumers.count, options))

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

    # -- within ------------------------------------------------------------------------------------------------

    def _then(self, step: Step) -> Dataset:
        return Dataset(OneToOne((step,), self._readable()))

    def _readable(self) -> Node:
        if isinstance(self.node, Write):
            raise MisuseError(
                f"{self.node.label} is a sink: run it with `await dataset.arun()`, and go on from the dataset before "
                "it, or from what was written"
            )
        return self.node

    def _ask(self, ask: Ask | Embed, what: str, by_prefix: bool, rows: RowOptions | None) -> Dataset:
        step = row_function("map", ask, rows or {})
        prefix = prefix_of(ask) if by_prefix else None
        return self._then(msgspec.structs.replace(step, prefix=prefix, title=f"{what}({ask.output})"))

    def _all_to_all(self, barrier: Barrier) -> Dataset:
        return Dataset(AllToAll(barrier, (self._readable(),)))

    def _no_options(self, operation: str, options: RowOptions) -> None:
        if options:
            raise MisuseError(f"{operation}() of an Arrow expression takes no {next(iter(options))}=")

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
        parts = tuple(result) if isinstance(dataset.node, Write) else ()
        reports.append(Report(sum(part.rows for part in parts) if parts else result, parts, statistics))
    return reports
