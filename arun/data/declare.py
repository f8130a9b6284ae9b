"""Declaring steps: what users say, looked at where they say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from arun.data.batches import BatchFormat
from arun.data.block import Row
from arun.data.files import Mode
from arun.data.steps import BatchFunction, OnError, RowFunction
from arun.errors import MisuseError
from arun.guards import close_unused, shown, spelling
from arun.policies import Retry
from arun.signatures import kind_of, where

if TYPE_CHECKING:
    import pyarrow as pa

    from arun.executors import Executor

__all__ = ("BatchOptions", "RowOptions", "SinkOptions", "at_least", "batch_function", "names", "row_function")

_OPERATIONS = Literal["map", "filter", "flat_map", "with_column"]


class RowOptions(TypedDict, total=False):
    """How a function of a row is called.

    :ivar concurrency: most rows at a time. By default an async function has 100, and a plain one is called in one
        thread, row after row; with a number, each of its calls has a thread of its own.
    :ivar ordered: False hands rows on as they end, so that none waits for a slow one before it.
    :ivar executor: where plain functions run, a block at a time, such as a :class:`~arun.ProcessExecutor`.
    :ivar on_error: "fail" (the default): the first error ends the run; "skip": the row is left out; "collect": the row
        stays as it was given, and ``error_column`` has the error as text. It is null in all other rows, and later steps
        that collect errors pass such a row by.
    :ivar error_column: by default ``"error"``.
    :ivar retry: a :class:`~arun.Retry`: which errors are worth another call with the same row, before ``on_error``
        decides. A plain function then is called for one row at a time, or ``concurrency``.
    :ivar schema: a ``pyarrow.Schema`` of the rows that come out; by default it is taken from them.
    :ivar fuse: False makes the step a stage of its own, with a queue before and after it.
    """

    concurrency: int | None
    ordered: bool
    executor: Executor | None
    on_error: OnError
    error_column: str
    retry: Retry | None
    schema: pa.Schema | None
    fuse: bool


class BatchOptions(TypedDict, total=False):
    """How a function of a batch is called.

    :ivar format: "arrow" (the default): a ``pyarrow.RecordBatch``; "numpy": a dict of arrays, which can't be
        written to; "torch": of tensors, which can; "pandas": a DataFrame. It gives any of these, a
        ``pyarrow.Table``, or several of them.
    :ivar batch_size: rows of each batch but the last; by default batches are as they come.
    :ivar concurrency: most batches at a time; by default one.
    :ivar ordered: False hands batches on as they end.
    :ivar executor: where it runs, such as a :class:`~arun.ProcessExecutor`.
    :ivar keeps_rows: promises a row for each row that it is given, in their order. A limit may then move before it, and
        a checkpoint tells by their places which rows are finished. Their number is checked; their order is the
        function's to keep, as nobody else can tell.
    :ivar fuse: False makes the step a stage of its own, with a queue before and after it.
    """

    format: BatchFormat
    batch_size: int | None
    concurrency: int | None
    ordered: bool
    executor: Executor | None
    keeps_rows: bool
    fuse: bool


class SinkOptions(TypedDict, total=False):
    """Where and how files are written.

    :ivar mode: what to do where something is already: "error" (the default), "overwrite", or "append" parts to the
        folder. What is replaced is there until everything new is.
    :ivar part_bytes: a part that has grown past this is committed and another one begun; a single file has one.
    :ivar filesystem: of pyarrow or fsspec, where the path is no URL.
    """

    mode: Mode
    part_bytes: int | None
    filesystem: Any


def row_function(
    operation: _OPERATIONS, function: Callable[[Row], Any], options: RowOptions, column: str = ""
) -> RowFunction:
    """A step of a user's function of a row.

    :raises MisuseError: it is no function, or an option is out of its range.
    """
    _check_function(operation, function)
    kind = kind_of(function)
    if operation in {"filter", "with_column"} and "generator" in kind:
        gives = "whether to keep a row" if operation == "filter" else "one value for a row"
        raise MisuseError(f"{operation}() takes a function that returns {gives}; {where(function)} is a {kind}")
    on_error = options.get("on_error", "fail")
    if on_error not in get_args(OnError):
        raise MisuseError(f"{operation}(on_error={on_error!r}): takes 'fail', 'skip' or 'collect'")
    _check_concurrency(operation, options.get("concurrency"))
    _check_executor(operation, function, options.get("executor"))
    retry = options.get("retry")
    if retry is not None:
        if not isinstance(retry, Retry):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"{operation}(retry={retry!r}): takes a Retry, such as Retry(attempts=3)")
        if options.get("executor") is not None:
            raise MisuseError(
                f"{operation}(retry=..., executor=...): a function that runs elsewhere is not called again"
            )
        if "async" not in kind and kind != "coroutine":
            options = {**options, "concurrency": options.get("concurrency") or 1}
    if options.get("schema") is not None and operation in {"filter", "with_column"}:
        raise MisuseError(
            f"{operation}(schema=...): {operation} keeps the columns that there are; say it where rows are made"
        )
    return RowFunction(function=function, operation=operation, column=column, **options)


def batch_function(function: Callable[[Any], Any], options: BatchOptions) -> BatchFunction:
    """A step of a user's function of a batch.

    :raises MisuseError: it is no function, or an option is out of its range.
    """
    _check_function("map_batches", function)
    format_ = options.get("format", "arrow")
    if format_ not in get_args(BatchFormat):
        raise MisuseError(f"map_batches(format={format_!r}): takes 'arrow', 'numpy', 'torch' or 'pandas'")
    size = options.get("batch_size")
    if size is not None:
        at_least("map_batches", "batch_size", size, 1)
    _check_concurrency("map_batches", options.get("concurrency"))
    _check_executor("map_batches", function, options.get("executor"))
    return BatchFunction(function=function, **options)


def at_least(operation: str, name: str, value: int, least: int) -> int:
    """:raises MisuseError: the number is smaller, or no whole number."""
    if not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
        raise MisuseError(f"{operation}({name}={value!r}): it must be a whole number")
    if value < least:
        raise MisuseError(f"{operation}({name}={value}): it must be at least {least}")
    return value


def names(operation: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    """:raises MisuseError: there are none, or one is given twice, or is no name."""
    for column in columns:
        if not isinstance(column, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            hint = f"write each name by itself: {operation}('a', 'b')"
            raise MisuseError(f"{operation}() was given {shown(column)}; {hint}")
    if not columns or len(set(columns)) < len(columns):
        raise MisuseError(f"{operation}({', '.join(map(repr, columns))}): takes one or more names, each once")
    return columns


def _check_function(operation: str, function: Any) -> None:
    if callable(function) and not isinstance(function, type):
        return
    takes = "it takes a function, a coroutine function or a generator function"
    if operation in {"filter", "with_column"}:
        takes = "it takes a function, a coroutine function or an Arrow expression: pyarrow.compute.field('n') < 3"
    hint = spelling(function) or takes
    message = f"{operation}() was given {shown(function)}; {hint}"
    close_unused(function)
    raise MisuseError(message)


def _check_concurrency(operation: str, concurrency: int | None) -> None:
    if concurrency is not None:
        at_least(operation, "concurrency", concurrency, 1)


def _check_executor(operation: str, function: Callable[..., Any], executor: Any) -> None:
    if executor is not None and (isinstance(executor, type) or not hasattr(executor, "check")):
        raise MisuseError(
            f"{operation}(executor=...) was given {shown(executor)}; it takes an Executor, such as one of "
            "`async with ProcessExecutor() as executor`"
        )
    if executor is not None and kind_of(function) not in {"function", "generator"}:
        raise MisuseError(
            f"{operation}(executor=...) runs plain functions elsewhere; {where(function)} is async, and runs on this "
            "event loop: leave executor out"
        )
