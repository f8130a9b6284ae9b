"""Operations: what makes one dataset of another. Nothing here runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self, Unpack, cast, get_args

import msgspec
import pyarrow.compute as pc

from arun.data.all_to_all import Distinct, Join, RandomShuffle, Repartition, Sort
from arun.data.barriers import How
from arun.data.block import Row
from arun.data.declare import BatchOptions, RowOptions, SinkOptions, at_least, batch_function, names, row_function
from arun.data.engines import ActorCall, Ask, Cluster, Embed, Embedder, Engine, PromptOf, prefix_of
from arun.data.files import batch_sink, csv_sink, ipc_sink, jsonl_sink, parquet_sink
from arun.data.grouped import Grouped
from arun.data.logical import AllToAll, Barrier, Node, OneToOne, Union, Write, Zip
from arun.data.sink import Sink
from arun.data.steps import Drop, Expression, Limit, Rename, Select, Step, Where
from arun.errors import ActorDied, MisuseError
from arun.guards import shown
from arun.policies import Retry

__all__ = ("Operations",)


class Operations:
    """What a :class:`~arun.data.Dataset` is made of: every method returns another one, and costs nothing.

    :ivar node: the plan that it stands for.
    """

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node

    # -- one-to-one ---------------------------------------------------------------------------------------

    def map(self, function: Callable[[Row], Any], **options: Unpack[RowOptions]) -> Self:
        """A row for each row: what a function returns; a generator gives any number of rows, as with ``flat_map``.

        :param function: given a row, a dict that it may change; returns a dict. Plain or async.
        :param options: see :class:`~arun.data.declare.RowOptions`.
        """
        return self._then(row_function("map", function, options))

    def flat_map(self, function: Callable[[Row], Any], **options: Unpack[RowOptions]) -> Self:
        """Any number of rows for each row.

        :param function: given a row; returns an iterable of rows, or is a generator. Plain or async.
        :param options: see :class:`~arun.data.declare.RowOptions`.
        """
        return self._then(row_function("flat_map", function, options))

    def filter(self, condition: Callable[[Row], Any] | pc.Expression, **options: Unpack[RowOptions]) -> Self:
        """The rows for which a condition holds.

        :param condition: a function of a row, plain or async; or an Arrow expression such as
            ``pyarrow.compute.field("n") > 3``, which is much faster, and which some sources need not read rows for.
        :param options: of a function; see :class:`~arun.data.declare.RowOptions`.
        """
        if isinstance(condition, pc.Expression):
            self._prepare_expression("filter", options)
            return self._then(Where(condition))
        return self._then(row_function("filter", condition, options))

    def with_column(
        self, name: str, value: Callable[[Row], Any] | pc.Expression, **options: Unpack[RowOptions]
    ) -> Self:
        """One more column, or another one in its place.

        :param value: a function of a row, plain or async, or an Arrow expression.
        :param options: of a function; see :class:`~arun.data.declare.RowOptions`.
        """
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"with_column() was given {shown(name)} for a name; names of columns are text")
        if isinstance(value, pc.Expression):
            self._prepare_expression("with_column", options)
            return self._then(Expression(name, value))
        return self._then(row_function("with_column", value, options, name))

    def map_batches(self, function: Callable[[Any], Any], **options: Unpack[BatchOptions]) -> Self:
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
    ) -> Self:
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
    ) -> Self:
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
    ) -> Self:
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
    ) -> Self:
        """A row for each row: what a method of an actor returns. The actors live as long as the run.

        A row whose actor died meanwhile is asked again, at that one if ``restarts=`` has it started again, else at
        another: three times in all, unless ``rows`` has a ``retry`` that says otherwise.

        :param cls: an actor's class; ``cls(*args)`` is started ``replicas`` times.
        :param method: given a row; returns a row.
        :param in_flight: most rows that one actor has at a time.
        :param options: of ``cluster.spawn``, or further arguments of the class.
        """
        if not isinstance(cls, type):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"map_actor() was given {shown(cls)}; it takes an actor's class, and makes its own of it")
        if not callable(getattr(cluster, "spawn", None)):
            raise MisuseError(f"map_actor() was given {shown(cluster)}; it takes a LocalCluster or a RayCluster")
        at_least("map_actor", "replicas", replicas, 1)
        at_least("map_actor", "in_flight", in_flight, 1)
        call = ActorCall(cluster, cls, method, args=args, options=options, replicas=replicas, in_flight=in_flight)
        title = f"map_actor({cls.__name__}.{method})"
        given: RowOptions = {"retry": Retry(on=ActorDied, initial=0), **(rows or {})}
        return self._then(msgspec.structs.replace(row_function("map", call, given), title=title))

    def select(self, *columns: str) -> Self:
        """These columns only, in this order."""
        return self._then(Select(names("select", columns)))

    def drop(self, *columns: str) -> Self:
        """All columns but these."""
        return self._then(Drop(names("drop", columns)))

    def rename(self, columns: Mapping[str, str]) -> Self:
        """Other names for columns.

        :param columns: old to new.
        """
        if not isinstance(columns, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"rename() was given {shown(columns)}; it takes a mapping, {{'old': 'new'}}")
        names("rename", tuple(columns.values()))
        return self._then(Rename(dict(columns)))

    def limit(self, rows: int) -> Self:
        """The first rows; what is not needed for them is not computed."""
        return self._then(Limit(at_least("limit", "rows", rows, 0)))

    # -- all-to-all ------------------------------------------------------------------------------------------

    def sort(
        self,
        *by: str,
        descending: bool | Sequence[bool] = False,
        nulls: Literal["first", "last"] = "last",
    ) -> Self:
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
        if nulls not in {"first", "last"}:
            raise MisuseError(f"sort(nulls={nulls!r}): takes 'first' or 'last'")
        return self._all_to_all(Sort(names("sort", by), directions, nulls))

    def group_by(self, *keys: str) -> Grouped[Self]:
        """The rows with equal keys as groups, to be aggregated: ``group_by("lang").aggregate(rows="count")``.

        :param keys: columns; none of them: all rows are one group.
        """
        self._readable()
        return Grouped(self, names("group_by", keys) if keys else ())

    def distinct(self, *by: str) -> Self:
        """Each row once, in no particular order. On DuckDB; spills to disk.

        :param by: columns in which rows have to differ; of equal ones the first to come stays. By default all.
        """
        return self._all_to_all(Distinct(names("distinct", by) if by else None))

    def join(
        self,
        other: Self,
        on: str | Sequence[str] | Mapping[str, str] = (),
        how: How = "inner",
        *,
        suffix: str = "_right",
    ) -> Self:
        """Rows of this one with the rows of another that have equal keys, in no particular order. On DuckDB; spills.

        A null key equals nothing. The columns are those of this one, then those of the other without its keys.

        :param on: columns of both; or a mapping from one of this to one of the other. None for a cross join.
        :param how: "inner", "left", "right", "outer", "cross"; "semi" and "anti" give the rows with or without a match.
        :param suffix: what a column of the other gets whose name is taken.
        """
        keys = on if isinstance(on, str | Mapping) else tuple(on)
        if how not in get_args(How):
            raise MisuseError(f"join(how={how!r}): takes {', '.join(map(repr, get_args(How)))}")
        if bool(keys) == (how == "cross"):
            raise MisuseError(
                f"join(how={how!r}) takes {'no columns' if keys else 'the columns to join on'}: on={on!r}"
            )
        return type(self)(AllToAll(Join(keys, how, suffix), (self._readable(), *self._nodes_of("join", other))))

    def random_shuffle(self, *, seed: int | None = None) -> Self:
        """All rows in a random order, each order as likely as any other. Spills to disk.

        :param seed: the same one gives the same rows the same order; None for another one in every run.
        """
        return self._all_to_all(RandomShuffle(seed))

    def repartition(self, count: int | None = None, *, rows: int | None = None) -> Self:
        """The same rows in the same order, in other blocks.

        :param count: number of blocks, whose rows differ by one at most. All rows have to be there before the first.
        :param rows: in each block but the last; the rows stream.
        """
        if (count is None) == (rows is None):
            raise MisuseError("repartition() takes a count of blocks or the rows of each; give one of them")
        at_least("repartition", "rows" if count is None else "count", cast("int", rows if count is None else count), 1)
        return self._all_to_all(Repartition(count, rows))

    # -- several datasets ----------------------------------------------------------------------------------

    def union(self, *others: Self) -> Self:
        """The rows of this one, then those of the others."""
        return type(self)(Union((self._readable(), *self._nodes_of("union", *others))))

    def zip(self, *others: Self) -> Self:
        """The columns of this one and of others of as many rows, side by side; a name that is taken gets a number."""
        return type(self)(Zip((self._readable(), *self._nodes_of("zip", *others))))

    # -- sinks ----------------------------------------------------------------------------------------------

    def write_parquet(
        self,
        path: str | PathLike[str],
        *,
        partition_by: str | Sequence[str] = (),
        row_group_bytes: int = 32 << 20,
        compression: str = "zstd",
        **to: Unpack[SinkOptions],
    ) -> Self:
        """A dataset that writes Parquet files when it is run.

        :param path: a file that ends in ``.parquet``, or a folder for parts; a URL of either.
        :param partition_by: columns that are folders instead, as in ``answers/year=2024/lang=en/``, a file of each part
            in each of them; whole numbers, text, booleans and dates. Read, they are whole numbers or text.
        :param row_group_bytes: of Arrow memory that make one row group.
        :param compression: "zstd", "snappy", "gzip", "lz4", "brotli" or "none".
        :param to: see :class:`SinkOptions`.
        """
        sink = parquet_sink(
            path, partition_by=partition_by, row_group_bytes=row_group_bytes, compression=compression, **to
        )
        return self.write(sink)

    def write_jsonl(self, path: str | PathLike[str], **to: Unpack[SinkOptions]) -> Self:
        """A dataset that writes one JSON object a line when it is run.

        :param path: a file, compressed if it ends in ``.gz``, ``.zst`` and so on, or a folder for parts; or a URL.
        :param to: see :class:`SinkOptions`.
        """
        return self.write(jsonl_sink(path, **to))

    def write_csv(self, path: str | PathLike[str], *, delimiter: str | None = None, **to: Unpack[SinkOptions]) -> Self:
        """A dataset that writes CSV with a header when it is run; paths as for :meth:`write_jsonl`.

        :param delimiter: between values; by default a tab in a file that ends in ``.tsv``, and a comma in others.
        :param to: see :class:`SinkOptions`.
        """
        return self.write(csv_sink(path, delimiter=delimiter, **to))

    def write_ipc(self, path: str | PathLike[str], *, compression: str = "none", **to: Unpack[SinkOptions]) -> Self:
        """A dataset that writes Arrow IPC files (Feather 2) when it is run.

        :param path: a file that ends in ``.arrow``, or a folder for parts; a URL of either.
        :param compression: "zstd", "lz4" or "none".
        :param to: see :class:`SinkOptions`.
        """
        return self.write(ipc_sink(path, compression=compression, **to))

    def write_openai_batch(self, path: str | PathLike[str], **to: Unpack[SinkOptions]) -> Self:
        """A dataset that writes results as OpenAI's batch API gives them, when it is run.

        Of the columns ``custom_id`` must be there; ``body`` and ``error`` are JSON as text, or structs.

        :param to: see :class:`SinkOptions`.
        """
        return self.write(batch_sink(path, **to))

    def write(self, sink: Sink) -> Self:
        """A dataset that, when it is run, writes these rows.

        :param sink: where to; see :class:`~arun.data.sink.Sink`.
        """
        return type(self)(Write(sink, self._readable()))

    # -- within ------------------------------------------------------------------------------------------------

    def _then(self, step: Step) -> Self:
        return type(self)(OneToOne((step,), self._readable()))

    def _readable(self) -> Node:
        if isinstance(self.node, Write):
            raise MisuseError(
                f"{self.node.label} is a sink: run it with `await dataset.arun()`, and go on from the dataset before "
                "it, or from what was written"
            )
        return self.node

    def _nodes_of(self, operation: str, *others: Self) -> list[Node]:
        """The plans of other datasets."""
        for other in others:
            if not isinstance(other, Operations):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
                raise MisuseError(f"{operation}() was given {shown(other)}; it takes datasets: from_rows([...])")
        return [other._readable() for other in others]

    def _ask(self, ask: Ask | Embed, what: str, by_prefix: bool, rows: RowOptions | None) -> Self:
        step = row_function("map", ask, rows or {})
        prefix = prefix_of(ask) if by_prefix else None
        return self._then(msgspec.structs.replace(step, prefix=prefix, title=f"{what}({ask.output})"))

    def _all_to_all(self, barrier: Barrier) -> Self:
        return type(self)(AllToAll(barrier, (self._readable(),)))

    def _prepare_expression(self, operation: str, options: RowOptions) -> None:
        """Refuse options, and load what computes it: that takes long, so not in the event loop of a run."""
        importlib.import_module("arun.data.expressions")
        if options:
            raise MisuseError(f"{operation}() of an Arrow expression takes no {next(iter(options))}=")
