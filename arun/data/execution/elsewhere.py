"""Elsewhere: plain functions in an executor, a block at a time.

A block crosses as Arrow IPC, and a function as the executor lets functions cross: by the name that its module has for
it, or as code where the executor has a way for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from arun.actions import Action
from arun.context import ApplicationContext, Run
from arun.data.block import Block
from arun.data.execution.batch_functions import joined
from arun.data.execution.program import Program
from arun.data.execution.statistics import StepStatistics
from arun.data.steps import BatchFunction, RowFunction
from arun.state import State

if TYPE_CHECKING:
    from arun.executors import Executor

__all__ = ("BlockAction", "Elsewhere")

_LEFT_HERE = frozenset({"function", "executor", "prefix"})


class BlockAction(Action):
    """Steps over one block, as an action that an executor can run.

    :param steps: of which each function becomes an attribute, so that it crosses as functions do.
    """

    def __init__(self, steps: Sequence[BatchFunction | RowFunction], block_rows: int) -> None:
        self.name = " + ".join(step.label for step in steps)
        self.block_rows = block_rows
        self.kinds = [type(step).__name__ for step in steps]
        self.options = [_options_of(step) for step in steps]
        for number, step in enumerate(steps):
            setattr(self, f"function_{number}", step.function)

    def run(  # type: ignore[override]  # the inputs of an action go by their names
        self, state: State, block: bytes, numbers: list[int], traced: bool
    ) -> dict[str, Any]:
        """Run the steps.

        :param block: Arrow IPC, a stream of one batch.
        :param numbers: for each step, the number of the first row in what it has been given in all.
        :param traced: whether to tell which rows of the block the rows of the result come from.
        """
        batch = _read(block)
        counters = [StepStatistics("", rows_in=number) for number in numbers]
        program = Program(self._steps(), self.block_rows, counters)
        made = list(program.run(Block(batch, range(batch.num_rows) if traced else None)))
        return {
            "block": _write(joined([one.batch for one in made])),
            "origins": [origin for one in made for origin in one.origins or ()] if traced else None,
            "dropped": [origin for one in made for origin in one.dropped],
            "counts": [
                [counter.rows_in - number, counter.rows_out, counter.failed, counter.seconds]
                for counter, number in zip(counters, numbers, strict=True)
            ],
        }

    def update(self, result: Mapping[str, Any], state: State) -> State:
        """It leaves the State alone."""
        return state

    def _steps(self) -> list[BatchFunction | RowFunction]:
        steps: list[BatchFunction | RowFunction] = []
        for number, (kind, options) in enumerate(zip(self.kinds, self.options, strict=True)):
            function = getattr(self, f"function_{number}")
            if kind == "BatchFunction":
                steps.append(BatchFunction(function=function, **options))
            else:
                schema = options["schema"]
                given: dict[str, Any] = {**options}
                given["schema"] = None if schema is None else pa.ipc.read_schema(pa.py_buffer(schema))
                steps.append(RowFunction(function=function, **given))
        return steps


class Elsewhere:
    """Runs blocks through steps in an executor."""

    def __init__(
        self,
        steps: Sequence[BatchFunction | RowFunction],
        counters: Sequence[StepStatistics],
        executor: Executor,
        block_rows: int,
    ) -> None:
        self._action = BlockAction(steps, block_rows)
        self._counters = counters
        self._executor = executor
        self._keeps_rows = all(step.keeps_rows for step in steps)
        self._traces = all(isinstance(step, RowFunction) for step in steps)
        self._given = 0

    async def run(self, block: Block) -> Block:
        """One block, of which the executor gets a copy.

        :raises MisuseError: a function can't be run there; says why.
        :raises WorkerDied: its process ended.
        """
        self._executor.check(self._action)
        traced = block.origins is not None and self._traces
        numbers = [counter.rows_in for counter in self._counters]
        numbers[0] = self._given
        self._given += block.rows
        inputs = {"block": _write(block.batch), "numbers": numbers, "traced": traced}
        for counter in self._counters:
            counter.begin()
        try:
            result, _ = await self._executor.run(self._action, State({}), inputs, _context(self._action))
        finally:
            for counter in self._counters:
                counter.in_flight -= 1
        for counter, (rows_in, rows_out, failed, seconds) in zip(self._counters, result["counts"], strict=True):
            counter.rows_in += rows_in
            counter.rows_out += rows_out
            counter.failed += failed
            counter.seconds += seconds
        batch = _read(result["block"])
        origins = block.origins
        if origins is None:
            return Block(batch)
        if not traced:
            return Block(batch, origins if self._keeps_rows else None, block.dropped)
        dropped = [origins[place] for place in result["dropped"]]
        return Block(batch, [origins[place] for place in result["origins"]], [*block.dropped, *dropped])


def _options_of(step: BatchFunction | RowFunction) -> dict[str, Any]:
    options = {name: getattr(step, name) for name in step.__struct_fields__ if name not in _LEFT_HERE}
    schema = options.get("schema")
    if schema is not None:
        options["schema"] = schema.serialize().to_pybytes()
    return options


def _context(action: Action) -> ApplicationContext:
    return ApplicationContext(
        app_id="arun dataset",
        partition_key=None,
        sequence_id=0,
        action_name=action.display_name,
        path=(),
        inputs={},
        resources={},
        run=Run(),
    )


def _write(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _read(written: bytes) -> pa.RecordBatch:
    with pa.ipc.open_stream(written) as reader:
        return reader.read_next_batch()
