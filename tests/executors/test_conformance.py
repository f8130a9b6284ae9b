"""What holds on every executor: subtasks run as they do here. To take in another one, add it to EXECUTORS."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Callable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import anyio
import executor_subjects as subjects
import numpy as np
import pytest
from executor_fan import Fan, app_of, in_other_processes, outs_of

from arun import (
    Capacity,
    Failed,
    Item,
    MisuseError,
    Ok,
    Partial,
    Policy,
    Retry,
    RunnableGraph,
    State,
    SubGraphTask,
    ThreadExecutor,
    WorkerDied,
)
from arun.context import ApplicationContext, Run
from arun.errors import RemoteError
from arun.executors import Executor

pytestmark = pytest.mark.anyio

VALUES: list[Any] = [
    None,
    True,
    -1,
    10**40,
    1.5,
    math.inf,
    "text \u00e4 \U0001f600",
    "\ud800",
    b"\x00bytes",
    bytearray(b"array"),
    [1, [2, (3, {4})]],
    (1, ("nested", [2])),
    {1, 2, 3},
    frozenset({"a"}),
    {1: "int key", ("tuple", "key"): None, "s": {"deep": (1,)}},
    Decimal("1.10"),
    UUID(int=7),
    datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime(2026, 1, 2, tzinfo=UTC),
    datetime(2026, 7, 2, tzinfo=ZoneInfo("Europe/Berlin")),
    date(2026, 1, 2),
    time(1, 2, 3),
    timedelta(days=1, microseconds=2),
    1 + 2j,
    Fraction(1, 3),
    range(1, 10, 2),
    subjects.Colour.RED,
    subjects.Point(1, (2, 3)),
    subjects.Shape("s", [subjects.Point(0, ())]),
    subjects.Pair(1, [2]),
    State({"inner": (1, 2)}),
]


class Everything:
    """A sink that has room for all events."""

    full = False

    async def room(self, kind: object) -> None: ...

    def put(self, event: object) -> None: ...


def context_of(run: Run) -> ApplicationContext:
    return ApplicationContext(
        app_id="a",
        partition_key=None,
        sequence_id=0,
        action_name="x",
        path=(),
        inputs={},
        resources={},
        run=run,
    )


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return [(k, type(k)) for k in left] == [(k, type(k)) for k in right] and all(
            same(left[k], right[k]) for k in left
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, State):
        return same(left.get_all(), right.get_all())
    return bool(left == right)


# -- results ---------------------------------------------------------------------------------------------------------


async def test_results_are_equal_to_local_ones_for_every_type_of_value(executor: Executor, kind: str) -> None:
    tasks = [SubGraphTask(subjects.ECHO[kind], State({"value": value})) for value in VALUES]
    outs = await outs_of(executor, *tasks)
    assert len(outs) == len(VALUES)
    for value, out in zip(VALUES, outs, strict=True):
        assert same(out, (value, None)), value


async def test_arrays_arrive_with_their_type_and_shape(executor: Executor) -> None:
    value = np.arange(6, dtype="<f4").reshape(2, 3)
    (out,) = await outs_of(executor, SubGraphTask(subjects.echo_function, State({"value": value})))
    assert out[0].dtype == value.dtype
    assert (out[0] == value).all()


async def test_what_run_returns_is_what_perform_returns(executor: Executor, kind: str) -> None:
    """The protocol itself: the result, and a State whose delta is what the action wrote."""
    state = State({"value": (1, 2), "unrelated": object()})
    result, changes = await executor.run(subjects.ECHO[kind], state, {}, context_of(Run()))
    assert result == ({"result": (1, 2)} if kind == "coroutine" else None)
    assert changes.delta.written == {"out": ((1, 2), None)}
    assert changes.delta.deleted == frozenset()


async def test_a_state_of_many_large_values_crosses(executor: Executor) -> None:
    value = {str(n): b"x" * 100_000 for n in range(100)}
    (out,) = await outs_of(executor, SubGraphTask(subjects.echo_function, State({"value": value})))
    assert out[0] == value


async def test_deleted_keys_are_deleted(executor: Executor) -> None:
    class Seen(Fan):
        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(outs=[sorted(done) async for done in states])

    result = await app_of(executor, Seen(SubGraphTask(subjects.wipe, State({"value": 1, "other": 2})))).arun()
    assert result.state["outs"] == [["other", "out"]]


async def test_a_subtask_keeps_the_keys_that_it_does_not_read(executor: Executor) -> None:
    class Seen(Fan):
        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(outs=[(done["mark"], done.action) async for done in states])

    marker = object()
    result = await app_of(
        executor, Seen(SubGraphTask(subjects.echo_function, State({"value": 1, "mark": marker})))
    ).arun()
    assert result.state["outs"] == [(marker, "echo_function")]


# -- arguments -------------------------------------------------------------------------------------------------------


async def test_bound_arguments_inputs_and_names_reach_the_action(executor: Executor, kind: str) -> None:
    echo, state = subjects.ECHO[kind], State({"value": 1})
    app = app_of(
        executor,
        Fan(
            SubGraphTask(echo.bind(suffix=(1, 2)), state),
            SubGraphTask(echo, state, {"suffix": {3}}),
            SubGraphTask(echo.with_name("renamed"), state),
        ),
    )
    result = await app.arun(inputs={"suffix": "of the run", "unused": 1})
    assert result.state["outs"] == [(1, (1, 2)), (1, {3}), (1, "of the run")]


async def test_class_actions_run_with_their_attributes(executor: Executor) -> None:
    state = State({"value": 1})
    doubled = subjects.Doubled(subjects.Point(1, (2,)))
    outs = await outs_of(
        executor,
        SubGraphTask(doubled, state),
        SubGraphTask(doubled.bind(suffix="s").with_name("other"), state),
        SubGraphTask(subjects.TwoSteps(), state),
    )
    assert outs == [(1, subjects.Point(1, (2,)), None), (1, subjects.Point(1, (2,)), "s"), (1, None)]


async def test_the_context_tells_where_the_subtask_is(executor: Executor) -> None:
    fan = Fan(SubGraphTask(subjects.tell_context, State(), {"n": 1}, key="k"))
    result = await app_of(executor, fan).session("the-app").arun(inputs={"wanted": (1,)})
    assert result.state["outs"] == [("the-app", "tell_context", ("fan", "k"), {"wanted": (1,)}, None)]


# -- events ----------------------------------------------------------------------------------------------------------


async def test_items_and_partials_stream_in_order_with_their_paths(executor: Executor, kind: str) -> None:
    app = app_of(
        executor,
        Fan(*(SubGraphTask(subjects.ECHO[kind], State({"value": (n,)}), key=f"k{n}") for n in range(3))),
    )
    seen: dict[tuple[str, ...], list[Any]] = {}
    numbers: list[int] = []
    async for event in app.astream():
        numbers.append(event.seq)
        if isinstance(event, Item):
            assert event.action == subjects.ECHO[kind].name
            seen.setdefault(event.path, []).extend(event.values)
        elif isinstance(event, Partial) and event.path:
            seen.setdefault(event.path, []).append(event.changed)
    assert numbers == list(range(1, len(numbers) + 1))
    if "generator" not in kind:
        assert seen == {}
    else:
        assert seen == {("fan", f"k{n}"): [("item", (n,)), {"out": None}, {"out": ((n,), None)}] for n in range(3)}


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "expected", "args"),
    [
        ("value", ValueError, ("bad value", 7)),
        ("file", FileNotFoundError, (2, "No such file")),
        ("key", KeyError, ("k",)),
        ("misuse", MisuseError, ("misused",)),
    ],
)
async def test_one_failure_is_raised_bare_with_a_note_naming_the_subtask(
    executor: Executor, kind: str, what: str, expected: type[Exception], args: tuple[Any, ...]
) -> None:
    with pytest.raises(expected) as caught:
        await outs_of(executor, SubGraphTask(subjects.FAIL[kind], State({"what": what}), label="the subtask"))
    assert type(caught.value) is expected
    assert caught.value.args == args
    notes = caught.value.__notes__
    assert "in the subtask" in notes
    assert what != "value" or "a note of the action's" in notes
    assert getattr(caught.value, "filename", None) == ("/nowhere" if what == "file" else None)


async def test_an_error_keeps_its_cause(executor: Executor, kind: str) -> None:
    with pytest.raises(RuntimeError, match="outer") as caught:
        await outs_of(executor, SubGraphTask(subjects.FAIL[kind], State({"what": "caused"})))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_a_group_of_errors_arrives_as_a_group(executor: Executor, kind: str) -> None:
    with pytest.raises(ExceptionGroup, match="several") as caught:  # noqa: ASYNC401 - members differ by executor
        await outs_of(executor, SubGraphTask(subjects.FAIL[kind], State({"what": "group"})))
    assert caught.group_contains(ValueError, match="one")
    other = RemoteError if in_other_processes(executor) else subjects.OfTheProgram
    assert caught.group_contains(other, match="two")


async def test_failures_can_be_skipped_or_collected(executor: Executor, kind: str) -> None:
    tasks = [
        SubGraphTask(subjects.FAIL[kind], State({"what": what})) for what in ("fine", "value", "well", "value", "so")
    ]
    skipped = await outs_of(executor, *tasks, policy=Policy(on_error="skip", order="submitted"))
    assert skipped == ["fine", "well", "so"]
    collected = await outs_of(executor, *tasks, policy=Policy(on_error="collect", order="submitted"))
    assert [type(outcome) for outcome in collected] == [Ok, Failed, Ok, Failed, Ok]
    assert isinstance(collected[1].error, ValueError)


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (subjects.read_undeclared, r"'read_undeclared' reads state\['other'\], which it does not declare"),
        (subjects.write_undeclared, r"'write_undeclared' wrote 'extra', which it does not declare"),
        (subjects.write_nothing, r"did not write 'out'"),
    ],
)
async def test_undeclared_reads_and_writes_are_refused(executor: Executor, subject: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        await outs_of(executor, SubGraphTask(subject, State({"value": 1, "other": 2})))


# -- cancellation ----------------------------------------------------------------------------------------------------


async def test_an_early_exit_cancels_what_runs_and_awaits_its_clean_up(
    executor: Executor, stoppable: str, folder: Path, begun: Callable[[], Any]
) -> None:
    hold = SubGraphTask(subjects.HOLD[stoppable], State({"folder": str(folder)}))
    quick = SubGraphTask(subjects.tell_n_plainly, State({"n": 7}))
    assert await outs_of(executor, hold, quick, policy=Policy(), take=1, begun=begun) == [7]
    assert (folder / "cleaned").exists()
    assert await outs_of(executor, quick) == [7]


async def test_cancelling_the_run_cancels_the_subtask_and_awaits_its_clean_up(
    executor: Executor, stoppable: str, folder: Path, begun: Callable[[], Any]
) -> None:
    hold = SubGraphTask(subjects.HOLD[stoppable], State({"folder": str(folder)}))
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(outs_of, executor, hold)
            await begun()
            scope.cancel()
    assert scope.cancelled_caught
    assert (folder / "cleaned").exists()


async def test_leaving_the_stream_awaits_the_clean_up(
    executor: Executor, streaming: str, folder: Path, begun: Callable[[], Any]
) -> None:
    app = app_of(executor, Fan(SubGraphTask(subjects.HOLD[streaming], State({"folder": str(folder)}))))
    async with app.astream() as events:
        async with anyio.create_task_group() as group:
            group.start_soon(begun)
            async for event in events:
                if isinstance(event, Item):
                    break
    assert (folder / "cleaned").exists()


# -- many ------------------------------------------------------------------------------------------------------------


async def test_many_subtasks_run_over_few_workers_and_keep_to_the_limit(executor: Executor) -> None:
    subjects.reset_count()
    tasks = [SubGraphTask(subjects.count_at_once, State({"value": n})) for n in range(500)]
    outs = await outs_of(executor, *tasks, policy=Policy(limit=7, order="submitted"))
    assert len(outs) == 500
    assert max(most for _, most in outs) <= (1 if in_other_processes(executor) else 7)
    if in_other_processes(executor):
        assert len({pid for pid, _ in outs}) == 2


async def test_a_capacity_is_held_while_a_subtask_runs(executor: Executor) -> None:
    subjects.reset_count()
    tasks = [SubGraphTask(subjects.count_at_once, State({"value": n})) for n in range(20)]
    outs = await outs_of(executor, *tasks, policy=Policy(capacity=Capacity(1)))
    assert {most for _, most in outs} == {1}


async def test_a_failed_attempt_is_retried_also_after_the_death_of_its_process(
    executor: Executor, folder: Path
) -> None:
    own_process = in_other_processes(executor)
    task = SubGraphTask(subjects.flaky, State({"folder": str(folder), "own_process": own_process}))
    retry = Retry(attempts=3, on=(ConnectionError, WorkerDied), initial=0)
    stream = app_of(executor, Fan(task, policy=Policy(retry=retry))).astream()
    seen = [(event.attempt, event.values) async for event in stream if isinstance(event, Item)]
    assert stream.result.state["outs"] == [3]
    # What a process yields right before it dies may be lost with it; SubtaskRetried voids it anyway.
    assert [item for item in seen if item[0] != 2] == [(1, [1]), (3, [3])]


async def test_what_is_yielded_counts_as_progress_whether_or_not_anybody_listens(
    executor: Executor, streaming: str
) -> None:
    for run in (Run(), Run(Everything())):
        beats: list[None] = []
        context = context_of(run)
        context.beats = (lambda beats=beats: beats.append(None),)
        await executor.run(subjects.ECHO[streaming], State({"value": 1}), {}, context)
        assert 1 <= len(beats) <= 3


async def test_contextvars_reach_a_subtask_of_this_process_and_never_leak_back(executor: Executor) -> None:
    token = subjects.VARIABLE.set("of the caller")
    try:
        (out,) = await outs_of(executor, SubGraphTask(subjects.tell_variable, State()))
        assert out == ("unset" if in_other_processes(executor) else "of the caller")
        assert subjects.VARIABLE.get() == "of the caller"
    finally:
        subjects.VARIABLE.reset(token)


# -- graphs and nesting ----------------------------------------------------------------------------------------------


async def test_a_graph_runs_as_a_whole(executor: Executor) -> None:
    last = subjects.tell_n_plainly if isinstance(executor, ThreadExecutor) else subjects.tell_n
    graph = subjects.counting_graph(last)
    app = app_of(
        executor, Fan(SubGraphTask(graph.bind(step=1), State({"n": 0, "limit": 4, "stop": False}), key="graph"))
    )
    items: list[Any] = []
    events: list[tuple[str, tuple[str, ...]]] = []
    stream = app.astream()
    async for event in stream:
        if event.path:
            events.append((type(event).__name__, event.path))
        if isinstance(event, Item):
            items += event.values
    assert stream.result.state["outs"] == [4]
    assert items == [f"n was {n}" for n in range(4)]
    below = ("fan", "graph", "add")
    assert [name for name, path in events if path == below] == [
        *["ActionStarted", "Item", "Partial", "ActionFinished"] * 4,
        "ActionStarted",
        "ActionFinished",
    ]


async def test_a_parallel_action_as_a_subtask_stays_here_and_its_subtasks_go(executor: Executor) -> None:
    (out,) = await outs_of(executor, SubGraphTask(subjects.Inner(), State({"value": 1})))
    here, *pids = out
    assert here == os.getpid()
    assert all((pid != os.getpid()) == in_other_processes(executor) for pid in pids)


async def test_a_parallel_action_in_a_graph_goes_with_the_graph(executor: Executor) -> None:
    graph = RunnableGraph.create(subjects.Inner())
    (out,) = await outs_of(executor, SubGraphTask(graph, State({"value": 1})))
    assert len(set(out)) == 1
    assert (out[0] != os.getpid()) == in_other_processes(executor)
