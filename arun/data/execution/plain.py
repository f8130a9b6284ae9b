"""Plain steps as functions of a frame, and what becomes of a row that a user's function fails on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import GeneratorType
from typing import Any, Final, cast

import pyarrow as pa

from arun.data.block import Row, Shaper
from arun.data.execution.batch_functions import call_on_batch
from arun.data.execution.frame import Frame
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import BatchFunction, Drop, Expression, Limit, Rename, RowFunction, Select, Step, Where
from arun.errors import DataError, MisuseError
from arun.guards import close_unused, shown
from arun.logs import get_logger

__all__ = ("Failure", "LimitRun", "compiled", "listed", "note_row", "row_results", "tell_failure", "to_rows")

log = get_logger("arun.data")


def compiled(step: Step, counter: StepStatistics) -> Callable[[Frame], None]:
    """The step as a function that changes a frame."""
    match step:
        case RowFunction():
            return _RowRun(step, counter)
        case BatchFunction():
            return _BatchRun(step, counter)
        case Limit():
            return LimitRun(step.rows)
        case _:
            return _ColumnRun(step)


class LimitRun:
    """A limit. :ivar left: rows that it still lets through."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def __call__(self, frame: Frame) -> None:
        if len(frame) > self.left:
            frame.keep_first(self.left)
        self.left -= len(frame)


class _ColumnRun:
    """A step that is Arrow's, save that columns are chosen and named in rows, too."""

    def __init__(self, step: Select | Drop | Rename | Expression | Where) -> None:
        self._step = step
        self._shaper = Shaper(f"what comes before {step.label}")

    def __call__(self, frame: Frame) -> None:
        step = self._step
        if frame.rows_only and isinstance(step, Select | Drop | Rename):
            frame.become_rows([_with_row_columns(row, step) for row in frame.rows()], frame.origins)
            return
        batch = frame.batch(self._shaper)
        try:
            match step:
                case Where() if frame.origins is None:
                    frame.become_batch(batch.filter(step.expression), None)
                case Where():
                    frame.keep([kept is True for kept in _evaluate(batch, step.expression).to_pylist()])
                case _:
                    frame.become_batch(_with_columns(batch, step), frame.origins)
        except (KeyError, pa.ArrowException) as exc:
            raise _refused(step, batch.schema.names, exc) from exc


def _with_row_columns(row: Row, step: Select | Drop | Rename) -> Row:
    try:
        match step:
            case Select():
                return {name: row[name] for name in step.columns}
            case Drop():
                row = dict(row)
                for name in step.columns:
                    del row[name]
                return row
            case Rename():
                for name in step.names:
                    row[name]
                return {step.names.get(name, name): value for name, value in row.items()}
    except KeyError as exc:
        raise _refused(step, list(row), exc) from exc


def _with_columns(batch: pa.RecordBatch, step: Select | Drop | Rename | Expression) -> pa.RecordBatch:
    match step:
        case Select():
            return batch.select(list(step.columns))
        case Drop():
            return batch.drop_columns(list(step.columns))
        case Rename():
            for name in step.names:
                batch.column(name)
            return batch.rename_columns([step.names.get(name, name) for name in batch.schema.names])
        case Expression():
            values = _evaluate(batch, step.expression)
            position = batch.schema.get_field_index(step.column)
            if position < 0:
                return batch.append_column(step.column, values)
            return batch.set_column(position, step.column, values)


def _evaluate(batch: pa.RecordBatch, expression: Any) -> pa.Array:
    from arun.data.expressions import evaluate

    return evaluate(pa.Table.from_batches([batch]), expression)


def _refused(step: Step, names: list[str], exc: Exception) -> DataError:
    what = exc.args[0] if isinstance(exc, KeyError) else exc  # a KeyError's str() is its repr()
    return DataError(f"{step.label}: {what}; the columns are {', '.join(names) or 'none'}")


# -- rows ----------------------------------------------------------------------------------------------------


class Failure:
    """Stands for the result of a row that its function failed on, or that had failed before."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class _RowRun:
    """A user's function, over a list of rows."""

    def __init__(self, step: RowFunction, counter: StepStatistics) -> None:
        self._step = step
        self._counter = counter
        self._call = row_results(step, step.function)
        errors = {step.error_column} if step.on_error == "collect" else ()
        self._shaper = None if step.schema is None else Shaper(step.label, step.schema, errors)

    def __call__(self, frame: Frame) -> None:
        self._run(frame)
        if self._shaper is not None:  # also for the steps after it, that may leave columns out, or add some
            frame.become_batch(self._shaper.batch(frame.rows()), frame.origins)

    def _run(self, frame: Frame) -> None:
        rows = frame.rows()
        if not rows:
            if self._step.operation != "filter":
                frame.become_rows([], frame.origins)
            return
        if self._step.gives_many and self._step.on_error == "fail" and frame.origins is None:
            frame.become_rows(self._many(rows), None)
            return
        results, failed = self._results(rows)
        try:
            self._apply(frame, rows, results, failed)
        except MisuseError:
            for result in results:
                close_unused(result)
            raise

    def _apply(self, frame: Frame, rows: list[Row], results: list[Any], failed: int) -> None:
        step = self._step
        if step.operation == "filter" and step.on_error != "collect":
            types = set(map(type, results))
            if types != {bool}:
                results = [self._kept(result) for result in results]
            frame.keep(results)
        elif step.operation == "map" and not step.gives_many and not failed and step.on_error != "collect":
            if set(map(type, results)) != {dict}:
                results = [to_rows(step, result)[0] for result in results]
            frame.become_rows(results, frame.origins)
        elif step.operation == "with_column" and not failed and step.on_error != "collect":
            for result in {type(result): result for result in results}.values():
                if inspect.isawaitable(result):
                    raise _not_awaited(step, result)
            name = step.column
            frame.become_rows([{**row, name: value} for row, value in zip(rows, results, strict=True)], frame.origins)
        else:
            given = [rows_of(step, row, result) for row, result in zip(rows, results, strict=True)]
            origins = frame.origins
            if origins is not None:
                origins = [origin for origin, some in zip(origins, given, strict=True) for _ in some]
            frame.become_rows(list(chain.from_iterable(given)), origins)

    def _many(self, rows: list[Row]) -> list[Row]:
        """What a function that gives many rows makes of all of these.

        None of its lists is kept, as so many of them would cost the garbage collector more time than they took.
        """
        step = self._step
        given: list[Any] = []
        number = 0
        try:
            for number, row in enumerate(rows):  # noqa: B007 - where the error was
                some = step.function(row)
                given.extend(some if _is_many(some) else to_rows(step, some))
        except Exception as exc:  # noqa: BLE001 - raised again, with a note
            error = self._ended_early() if isinstance(exc, StopIteration) else exc
            tell_failure(step, self._counter, self._counter.rows_in - len(rows) + number, rows[number], error)
        return given if set(map(type, given)) <= {dict} else to_rows(step, given)

    def _results(self, rows: list[Row]) -> tuple[list[Any], int]:
        """A result or a Failure for every row."""
        results: list[Any] = []
        todo = iter(rows)
        failed = 0
        while True:
            error: Exception
            try:
                results.extend(map(self._call, todo))  # what came before an error stays in the list
                if len(results) == len(rows):
                    return results, failed
                error = self._ended_early()
            except Exception as exc:  # noqa: BLE001 - what becomes of it is the step's to say
                error = exc
            number = self._counter.rows_in - len(rows) + len(results)
            results.append(tell_failure(self._step, self._counter, number, rows[len(results)], error))
            failed += 1

    def _ended_early(self) -> RuntimeError:
        return RuntimeError(f"{self._step.label} raised StopIteration, which would end its rows early")

    def _kept(self, result: Any) -> bool:
        if isinstance(result, Failure):
            return False
        return kept(self._step, result)


def row_results(step: RowFunction, function: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """A plain function of a row as one that gives a whole result, and passes by a row that has failed before."""
    call = listed(function) if step.gives_many else function
    if step.on_error != "collect":
        return call
    column = step.error_column
    return lambda row: Failure("") if row.get(column) is not None else call(row)


def listed(function: Callable[[Row], Any]) -> Callable[[Row], Any]:
    """A function that gives rows as one that gives a list of them, errors of its generator included."""

    def call(row: Row) -> Any:
        rows = function(row)
        return list(rows) if _is_many(rows) else rows

    return call


def _is_many(rows: Any) -> bool:
    """Whether it is what a function that gives many rows may give."""
    return type(rows) in _MANY or (isinstance(rows, Iterable) and not isinstance(rows, Mapping | str | bytes))


#: Most are, and an ABC takes its time to tell.
_MANY: Final = frozenset({list, tuple, GeneratorType})


def rows_of(step: RowFunction, row: Row, result: Any) -> list[Row]:
    """What is left of a row: the rows that its result means."""
    if isinstance(result, Failure):
        if step.on_error == "skip":
            return []
        return [{**row, step.error_column: result.text}] if result.text else [row]
    rows: list[Row]
    match step.operation:
        case "filter":
            rows = [row] if kept(step, result) else []
        case "with_column":
            if inspect.isawaitable(result):
                raise _not_awaited(step, result)
            rows = [{**row, step.column: result}]
        case _:
            rows = to_rows(step, result)
    if step.on_error == "collect":
        return [{**one, step.error_column: None} for one in rows]
    return rows


def kept(step: RowFunction, result: Any) -> bool:
    """What a filter's result means."""
    if inspect.isawaitable(result):
        raise _not_awaited(step, result)
    return bool(result)


def to_rows(step: RowFunction, result: Any) -> list[Row]:
    """The rows that a function gave.

    :raises MisuseError: it gave something else.
    """
    if not step.gives_many:
        result = [result]
    elif not isinstance(result, list):
        raise _no_row(step, result, "it returns an iterable of rows, or yields rows")
    for position, row in enumerate(result):
        if type(row) is not dict:
            if not isinstance(row, Mapping):
                raise _no_row(step, row, "a row is a dict; to leave rows out use filter() or flat_map()")
            result[position] = dict(cast("Mapping[str, Any]", row))
    return cast("list[Row]", result)


def _no_row(step: RowFunction, result: Any, hint: str) -> MisuseError:
    if inspect.isawaitable(result):
        return _not_awaited(step, result)
    return MisuseError(f"{step.label} gave {shown(result)}; {hint}")


def _not_awaited(step: RowFunction, result: Any) -> MisuseError:
    message = f"{step.label} gave {shown(result)}, which nobody awaits; write the function as an `async def`"
    close_unused(result)
    return MisuseError(message)


def tell_failure(step: RowFunction, counter: StepStatistics, number: int, row: Row, error: Exception) -> Failure:
    """What stands for the result of a row that failed.

    :param number: of the row in what the step was given, from 0.
    :raises Exception: the error itself, with a note that names step and row, if the step is to fail.
    """
    if step.on_error == "fail" or isinstance(error, MisuseError):
        note_row(step, number, row, error)
        raise error
    counter.failed += 1
    log.info("row.failed", step=step.label, row=number, error=repr(error), on_error=step.on_error)
    return Failure(f"{type(error).__name__}: {error}")


def note_row(step: RowFunction, number: int, row: Row, error: Exception) -> None:
    """Say on an error where it was."""
    error.add_note(f"in {step.label}, row {number} of what it was given: {row!r:.200}")


# -- batches --------------------------------------------------------------------------------------------------


class _BatchRun:
    """A user's function, over a batch."""

    def __init__(self, step: BatchFunction, counter: StepStatistics) -> None:
        self._step = step
        self._counter = counter
        self._shaper = Shaper(f"what comes before {step.label}")

    def __call__(self, frame: Frame) -> None:
        batch = frame.batch(self._shaper)
        given = call_on_batch(self._step, batch, self._counter.rows_in - len(frame))
        frame.become_batch(given, frame.origins if given.num_rows == len(frame) else None)
