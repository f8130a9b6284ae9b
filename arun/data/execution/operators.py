"""Operators: what the nodes of a plan do, as ``blocks in -> blocks out``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast

import anyio
import pyarrow as pa

from arun.data.all_to_all import scan_of
from arun.data.barriers import Limits, Relation
from arun.data.block import Block
from arun.data.execution.batchwise import batchwise
from arun.data.execution.boundary import Reader
from arun.data.execution.iterate import iterate
from arun.data.execution.program import Program
from arun.data.execution.read import read, through
from arun.data.execution.rowwise import rowwise
from arun.data.execution.statistics import StageStatistics, StepStatistics
from arun.data.execution.streamed import streamed
from arun.data.known import known_schema
from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Read, Union, Write, Zip
from arun.data.segments import segments
from arun.data.steps import BatchFunction, RowFunction
from arun.errors import MisuseError
from arun.hosting import GRACE, close
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from arun.data.execution.execution import Execution

__all__ = ("operate",)

Blocks: TypeAlias = AsyncIterator[Block]


def operate(
    node: Node, reader: Callable[[int], Blocks], execution: Execution, statistics: StageStatistics
) -> AsyncGenerator[Block]:
    """The blocks of a node.

    :param reader: gives what reads the node of this id, which another stage runs.
    """

    def below(one: Node) -> Blocks:
        inline = isinstance(node, OneToOne | AllToAll) and node.inline
        return operate(one, reader, execution, statistics) if inline else reader(one.id)

    match node:
        case Read():
            return read(node.source, None, execution)
        case Iterate():
            return iterate(node, execution)
        case OneToOne():
            return _steps(node, below, execution, statistics)
        case AllToAll():
            return _barrier(node, below, execution)
        case Union():
            return _union([below(one) for one in node.inputs], ahead=not execution.limited(node))
        case Zip():
            return _zip([below(one) for one in node.inputs])
        case Write():
            raise AssertionError("a sink is no stage")


def _steps(
    node: OneToOne, below: Callable[[Node], Blocks], execution: Execution, statistics: StageStatistics
) -> AsyncGenerator[Block]:
    counters = {id(step): StepStatistics(step.label) for step in node.steps}
    statistics.steps.extend(counters.values())
    upstream: Blocks | None = None
    for segment in segments(node.steps):
        counts = [counters[id(step)] for step in segment.steps]
        if segment.kind == "plain":
            program = Program(segment.steps, execution.options.block_rows, counts)
            if upstream is None and node.inline and isinstance(node.input, Read):
                upstream = read(node.input.source, program, execution)
            else:
                upstream = through(upstream or below(node.input), program)
        elif segment.kind == "rows":
            steps = [step for step in segment.steps if isinstance(step, RowFunction)]
            blocks = upstream or below(node.input)
            # What is left of a row that fails is known only at its end, and so is when an origin is finished.
            streams = steps[0].streams and steps[0].on_error == "fail" and steps[0].retry is None
            if streams and execution.progress is None:
                upstream = streamed(blocks, steps[0], counts[0], execution)
            else:
                upstream = rowwise(blocks, steps, counts, execution)
        else:
            functions = [step for step in segment.steps if isinstance(step, BatchFunction | RowFunction)]
            upstream = batchwise(upstream or below(node.input), functions, counts, execution)
    return cast("AsyncGenerator[Block]", upstream)


def _barrier(node: AllToAll, below: Callable[[Node], Blocks], execution: Execution) -> AsyncGenerator[Block]:
    given_rows = [0] * len(node.inputs)
    inputs = [(one, _batches(below(one), given_rows, at)) for at, one in enumerate(node.inputs)]
    options = execution.options

    async def run() -> AsyncGenerator[Block]:
        given: AsyncGenerator[pa.RecordBatch] | None = None
        try:
            relations = [await run_in_thread(partial(_relation, node, one, batches)) for one, batches in inputs]
            given = node.barrier.run(relations, Limits(memory=options.memory_limit, folder=options.folder))
            rows = 0
            async for batch in given:
                rows += batch.num_rows
                yield Block(batch)
            if node.barrier.traits.keeps_rows and relations[0].blocks is not None and rows != given_rows[0]:
                raise MisuseError(
                    f"{node.barrier.label} says that it keeps rows, and gave {rows} for {given_rows[0]}; correct its "
                    "traits"
                )
        finally:
            with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
                if given is not None:
                    await close(given)
                for _, batches in inputs:
                    await close(batches)

    return run()


def _relation(node: AllToAll, below: Node, batches: AsyncGenerator[pa.RecordBatch]) -> Relation:
    """What a barrier reads of an input. May block: sources look into their files."""
    if node.inline and node.barrier.traits.scans and isinstance(below, Read):
        scan = scan_of(below.source)
        if scan is not None:
            return scan
    return Relation.of_blocks(batches, known_schema(below))


async def _batches(blocks: Blocks, counts: list[int], at: int) -> AsyncGenerator[pa.RecordBatch]:
    try:
        async for block in blocks:
            counts[at] += block.rows
            if block.rows or block.batch.num_columns:  # otherwise it says nothing, not even which columns there are
                yield block.batch
    finally:
        with anyio.CancelScope(shield=True, deadline=anyio.current_time() + GRACE):
            await close(blocks)


async def _union(inputs: Sequence[Blocks], *, ahead: bool) -> AsyncGenerator[Block]:
    """One input after the other, while the next one fills its queue.

    :param ahead: false where a limit may end it before that one's turn.
    """
    for blocks, following in zip(inputs, [*inputs[1:], None], strict=True):
        if ahead and isinstance(following, Reader):
            following.begin()
        async for block in blocks:
            yield block


async def _zip(inputs: Sequence[Blocks]) -> AsyncGenerator[Block]:
    waiting: list[Block | None] = [None] * len(inputs)
    while True:  # noqa: ASYNC913 - it reads its inputs
        for number, blocks in enumerate(inputs):
            while (block := waiting[number]) is None or not block.rows:
                following = await anext(blocks, None)
                if following is None:
                    break
                waiting[number] = following
        here = [block for block in waiting if block is not None]
        ended = [block is None or not block.rows for block in waiting]
        if any(ended) and not all(ended):
            raise MisuseError("zip(): one side has more rows than another")
        if len(here) == len(inputs):
            rows = min(block.rows for block in here)
            columns = [column for block in here for column in block.batch.slice(0, rows).columns]
            yield Block(pa.RecordBatch.from_arrays(columns, names=_zipped_names(here)))
            waiting = [block.slice(rows) for block in here]
        if any(ended):
            return


def _zipped_names(blocks: Sequence[Block]) -> list[str]:
    """Names of all columns; one that is taken gets a number."""
    names: dict[str, None] = {}
    for number, block in enumerate(blocks):
        for name in block.batch.schema.names:
            names[name if name not in names else f"{name}_{number}"] = None
    return list(names)
