"""Which executor runs a subtask: the application's, the parallel action's, the task's; None turns one off."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

import executor_subjects as subjects
import pytest
from executor_fan import Fan, app_of, outs_of

from arun import (
    Action,
    ApplicationBuilder,
    ApplicationContext,
    LocalExecutor,
    MapStates,
    MisuseError,
    ProcessExecutor,
    RunnableGraph,
    State,
    SubGraphTask,
    ThreadExecutor,
    action,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _runtime(runtime: Any) -> None:
    """Every test here runs in the module's event loop."""


class Recording(LocalExecutor):
    """A real executor that says what it ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    async def run(self, action: Action, state: State, inputs: Any, context: ApplicationContext) -> tuple[Any, State]:
        self.ran.append(action.display_name)
        return await super().run(action, state, inputs, context)


TASK = SubGraphTask(subjects.echo_function, State({"value": 1}))


async def test_the_applications_executor_runs_subtasks_and_not_its_own_steps() -> None:
    recording = Recording()
    app = (
        ApplicationBuilder()
        .with_actions(fan=Fan(TASK), step=subjects.wipe)
        .with_transitions(("fan", "step"))
        .with_entrypoint("fan")
        .with_executor(recording)
        .with_state(value=1)
        .build()
    )
    await app.arun()
    assert recording.ran == ["echo_function"]
    await app.session().arun()
    assert recording.ran == ["echo_function"] * 2


async def test_a_parallel_actions_executor_goes_before_the_applications() -> None:
    outer, inner = Recording(), Recording()

    class Own(Fan):
        executor = inner

    await app_of(outer, Own(TASK)).arun()
    assert (outer.ran, inner.ran) == ([], ["echo_function"])


async def test_a_tasks_executor_goes_before_all() -> None:
    outer, inner = Recording(), Recording()
    await outs_of(outer, TASK, SubGraphTask(subjects.echo_function, State({"value": 1}), executor=inner))
    assert (outer.ran, inner.ran) == (["echo_function"], ["echo_function"])


async def test_none_turns_a_cascaded_one_off() -> None:
    outer = Recording()

    class Here(Fan):
        executor = None

    await app_of(outer, Here(TASK)).arun()
    await outs_of(outer, SubGraphTask(subjects.echo_function, State({"value": 1}), executor=None))
    assert outer.ran == []


async def test_it_cascades_through_parallel_actions_and_graphs() -> None:
    recording = Recording()
    await outs_of(recording, SubGraphTask(subjects.Inner(), State({"value": 1})))
    assert recording.ran == ["tell_place"] * 2
    recording.ran.clear()
    graph = RunnableGraph.create(subjects.Inner())
    app = ApplicationBuilder().with_actions(graph=graph).with_executor(recording).with_state(value=1, out=0).build()
    await app.arun()
    assert recording.ran == ["tell_place"] * 2


# -- what can't run there is refused when the application is built ---------------------------------------------------


class Over(MapStates):
    reads: Sequence[str] = ["values"]
    writes: Sequence[str] = ["outs"]

    def __init__(self, what: Any) -> None:
        self._what = what

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return self._what

    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        return (state.update(value=value) for value in state["values"])

    async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
        return state.update(outs=[done["out"] async for done in states])


def closure() -> Any:
    captured = os.getpid()

    @action(reads=["value"], writes=["out"])
    def closing_over(state: State) -> State:
        return state.update(out=captured)

    return closing_over


def test_a_closure_is_refused_at_build_by_name() -> None:
    builder = ApplicationBuilder().with_actions(over=Over(closure())).with_executor(ProcessExecutor())
    with pytest.raises(
        MisuseError,
        match=r"action 'closing_over' \(closure\.<locals>\.closing_over at .*test_choice\.py:\d+\) is defined inside "
        r"closure\(\), so a worker process can't import it; move it to the top level of its module",
    ):
        builder.build()


nameless = action(reads=["value"], writes=["out"])(lambda state: state.update(out=1))


def test_what_is_no_executor_is_refused_by_the_builder() -> None:
    for wrong in ("thread", ThreadExecutor, concurrent.futures.ThreadPoolExecutor(1)):
        with pytest.raises(MisuseError, match=r"takes an executor, such as ThreadExecutor\(\)"):
            ApplicationBuilder().with_executor(wrong)  # type: ignore[arg-type]  # what is refused


def test_a_lambda_is_refused_at_build() -> None:
    builder = ApplicationBuilder().with_actions(over=Over(nameless)).with_executor(ProcessExecutor())
    with pytest.raises(MisuseError, match="defined as a lambda"):
        builder.build()


def test_what_the_class_of_a_parallel_action_sets_is_checked_at_build() -> None:
    class Threaded(Over):
        executor = ThreadExecutor()

    with pytest.raises(MisuseError, match="'echo_coroutine' is async"):
        ApplicationBuilder().with_actions(over=Threaded(subjects.echo_coroutine)).build()
    graph = RunnableGraph.create(Threaded(subjects.echo_coroutine).with_name("inner"))
    with pytest.raises(MisuseError, match="'echo_coroutine' is async"):
        ApplicationBuilder().with_actions(graph=graph).build()


def test_an_action_that_depends_on_the_state_is_not_asked_for_at_build() -> None:
    class Depending(Over):
        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return {True: closure(), False: subjects.echo_function}[state["values"] == []]

    ApplicationBuilder().with_actions(over=Depending(None)).with_executor(ProcessExecutor()).build()


async def test_a_closure_among_the_tasks_is_refused_when_it_is_yielded() -> None:
    async with ProcessExecutor() as executor:
        with pytest.raises(MisuseError, match="closing_over") as caught:
            await outs_of(executor, SubGraphTask(closure(), State({"value": 1}), label="the third"))
        assert "in the third" in caught.value.__notes__
        assert executor.pids == []


def refused(executor: ProcessExecutor, what: Any) -> str:
    with pytest.raises(MisuseError) as caught:
        executor.check(what)
    return str(caught.value)


def decorated_twice(state: State) -> State:
    return state


first = action(reads=["value"], writes=["out"])(decorated_twice)


class Callable_:
    def __call__(self, state: State) -> State:
        return state


def test_every_way_not_to_be_importable_is_named() -> None:
    executor = ProcessExecutor()
    executor.check(first)  # the module has it under another name than its function's

    other = action(reads=["other"], writes=["out"])(decorated_twice)
    assert "is not what module" in refused(executor, other)
    assert "has no name in a module" in refused(executor, action(reads=[], writes=[])(Callable_()))

    class Local(subjects.TwoSteps):
        pass

    assert "'Local' of class Local is defined inside" in refused(executor, Local())
    unsendable = subjects.Doubled(object())  # type: ignore[arg-type]
    assert "the attribute by of action 'Doubled' can't cross" in refused(executor, unsendable)
    bound = subjects.echo_function.bind(suffix=object())
    assert "'suffix', which is bound to action 'echo_function', can't cross" in refused(executor, bound)
