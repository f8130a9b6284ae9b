"""A parallel action of given subtasks, for the tests of executors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import executor_subjects as subjects

from arun import (
    Application,
    ApplicationBuilder,
    LocalExecutor,
    Policy,
    State,
    SubGraphTask,
    TaskBasedParallelAction,
    ThreadExecutor,
)
from arun.executors import Executor


class Fan(TaskBasedParallelAction):
    """Runs the given subtasks; its result is what they wrote as ``out``, or what ``on_error`` makes of them."""

    reads: Sequence[str] = []
    writes: Sequence[str] = ["outs"]

    def __init__(
        self, *tasks: SubGraphTask, policy: Policy | None = None, take: int | None = None, begun: Any = None
    ) -> None:
        self._tasks = tasks
        self.policy = policy or Policy(order="submitted")
        self._take = take
        self._begun = begun

    async def tasks(self, state: State, context: Any, inputs: dict[str, Any]) -> AsyncGenerator[SubGraphTask, Any]:
        for number, task in enumerate(self._tasks):
            if number and self._begun is not None:
                await self._begun()
            yield task

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> State:
        outs: list[Any] = []
        async for done in states:
            outs.append(done.get("out") if isinstance(done, State) else done)
            if len(outs) == self._take:
                break
        return state.update(outs=outs)


def app_of(executor: Executor | None, fan: Fan, **resources: Any) -> Application:
    return ApplicationBuilder().with_actions(fan=fan).with_executor(executor).with_resources(**resources).build()


async def outs_of(executor: Executor | None, *tasks: SubGraphTask, **options: Any) -> list[Any]:
    result = await app_of(executor, Fan(*tasks, **options)).arun()
    return result.state["outs"]


async def pid_of(executor: Executor) -> int:
    (out,) = await outs_of(executor, SubGraphTask(subjects.tell_place, State()))
    return int(out["pid"])


def in_other_processes(executor: Executor) -> bool:
    """Whether that is where it runs subtasks."""
    return not isinstance(executor, LocalExecutor | ThreadExecutor)
