"""Streams of events: delivery, back-pressure, and every way to leave one."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio.lowlevel import checkpoint
from structlog.testing import capture_logs

from arun import (
    ActionFinished,
    ActionStarted,
    Application,
    ApplicationBuilder,
    ApplicationBusyError,
    Event,
    Item,
    MapStates,
    MisuseError,
    Partial,
    Policy,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunStarted,
    State,
    action,
    when,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("runtime", "nothing_left")]


def app_of(function: Callable[..., Any], *, writes: list[str] | None = None) -> Application:
    written = ["n"] if writes is None else writes
    return ApplicationBuilder().with_actions(action(reads=["n"], writes=written)(function)).with_state(n=0).build()


class Hangs:
    """An application that yields an item and hangs, and whose clean-up can be watched."""

    def __init__(self) -> None:
        self.cleaned, self.runs = False, 0
        self.hanging, self.ended = anyio.Event(), anyio.Event()
        self.app = app_of(self.hang)

    async def hang(self, state: State) -> AsyncIterator[Any]:
        self.runs += 1
        if self.runs > 1:
            assert self.cleaned
            yield state.increment(n=1)
            return
        try:
            yield "item"
            self.hanging.set()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.wait_all_tasks_blocked()
            self.cleaned = True
            self.ended.set()


def names(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


async def counting(state: State) -> AsyncIterator[Any]:
    for i in range(3):
        yield i
        yield state.update(n=i)


async def test_every_event_arrives_in_order_and_the_result_afterwards() -> None:
    app = app_of(counting)
    stream = app.astream()
    with pytest.raises(MisuseError, match=r"has not ended yet"):
        _ = stream.result
    events = [event async for event in stream]
    assert names(events) == [
        "RunStarted", "ActionStarted", *["Item", "Partial"] * 3, "ActionFinished", "RunFinished",
    ]  # fmt: skip
    assert [event.seq for event in events] == list(range(1, 11))
    assert len({event.run_id for event in events}) == 1
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert isinstance(events[0], RunStarted)
    assert events[0].app_id == app.uid
    assert isinstance(events[-1], RunFinished)
    assert (events[-1].action, events[-1].state) == ("counting", {"n": 2})
    assert isinstance(events[-2], ActionFinished)
    assert events[-2].written == {"n": 2}
    what, result, state = stream.result
    assert (what.name, result, state) == ("counting", None, {"n": 2})  # type: ignore[union-attr]
    assert [event async for event in stream] == []


async def test_an_error_is_raised_after_run_failed() -> None:
    async def broken(state: State) -> AsyncIterator[Any]:
        yield "item"
        raise ValueError("broken")

    stream = app_of(broken).astream()
    events: list[Event] = []

    async def consume() -> None:
        async for event in stream:
            events.append(event)  # noqa: PERF401 - kept when the stream raises

    with pytest.raises(ValueError, match="broken"):
        await consume()
    assert names(events) == ["RunStarted", "ActionStarted", "Item", "RunFailed"]
    assert isinstance(events[-1], RunFailed)
    assert events[-1].error == "ValueError: broken"
    with pytest.raises(ValueError, match="broken"):
        _ = stream.result


@pytest.mark.parametrize("deliver", ["sometimes", "", "Every", None, -1, float("nan")])
async def test_an_unknown_delivery_is_refused_and_nothing_is_raised_later(deliver: Any) -> None:
    with pytest.raises(MisuseError, match="takes 'every', 'latest' or a number of seconds"):
        app_of(counting).astream(deliver=deliver)
    gc.collect()


async def test_a_slow_consumer_holds_the_run_up() -> None:
    made = 0

    async def endless(state: State) -> AsyncIterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    for deliver, waiting in (("every", 64), ("latest", 1024)):
        made = 0
        async with app_of(endless).astream(deliver=deliver) as stream:  # type: ignore[arg-type]
            taken = 0
            async for event in stream:
                await anyio.wait_all_tasks_blocked()
                taken += len(event.values) if isinstance(event, Item) else 0
                assert made - taken <= waiting + 1
                if taken >= 2 * waiting:
                    break
        assert taken >= 2 * waiting


async def test_many_senders_that_wait_for_room_leave_no_gap_and_no_disorder() -> None:
    chatty = action(reads=["i"], writes=["y"])(_chatty)

    class Many(MapStates):
        reads = ()
        writes = ("n",)
        policy = Policy(limit=30)

        def action(self, state: State, inputs: Any) -> Any:
            return chatty

        async def states(self, state: State, context: Any, inputs: Any) -> Any:
            for i in range(60):
                yield state.update(i=i)

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            taken = 0
            async for _ in states:
                taken += 1
                if taken == 40:
                    return state.update(n=taken)
            return state

    seen: list[int] = []
    async for event in ApplicationBuilder().with_actions(Many()).build().astream():
        seen.append(event.seq)
        if event.seq % 10 == 0:
            await anyio.wait_all_tasks_blocked()
    assert seen == list(range(1, len(seen) + 1))


async def _chatty(state: State) -> AsyncIterator[Any]:
    for _ in range(state["i"] % 7):
        yield "item"
        await checkpoint()
    yield state.update(y=1)


# -- latest and every so many seconds ---------------------------------------------------------------


@pytest.mark.parametrize("deliver", ["latest", 0.0, 0.001])
async def test_conflated_delivery_merges_partials_joins_items_and_keeps_the_rest(deliver: Any) -> None:
    async def busy(state: State) -> AsyncIterator[Any]:
        for i in range(50):
            yield i
            yield state.update(n=i, last=i) if i % 2 else state.update(n=i)

    stream = app_of(busy, writes=["n", "last"]).astream(deliver=deliver)
    events: list[Event] = []
    async for event in stream:
        events.append(event)
        await anyio.wait_all_tasks_blocked()
    assert [n for n in names(events) if n not in {"Item", "Partial"}] == [
        "RunStarted", "ActionStarted", "ActionFinished", "RunFinished",
    ]  # fmt: skip
    assert [v for event in events if isinstance(event, Item) for v in event.values] == list(range(50))
    partials = [event.changed for event in events if isinstance(event, Partial)]
    assert len(partials) < 50
    assert partials[-1] == {"n": 49, "last": 49}
    assert [event.seq for event in events] == sorted(event.seq for event in events)


async def test_partials_of_two_visits_are_never_merged() -> None:
    @action(reads=["visit"], writes=["visit", "n", "early"])
    async def step(state: State) -> AsyncIterator[State]:
        if state["visit"] == 0:
            yield state.update(visit=1, n=1, early=1)
            yield state.update(visit=1, n=5, early=5)
        else:
            yield state.update(visit=2, n=2)
            yield state.update(visit=2, n=6, early=6)

    app = (
        ApplicationBuilder()
        .with_actions(step)
        .with_transitions(("step", "step", when(visit=1)))
        .with_state(visit=0)
        .build()
    )
    known: dict[str, Any] = {}
    written: list[dict[str, Any]] = []
    async for event in app.astream(deliver="latest"):
        await anyio.wait_all_tasks_blocked()
        if isinstance(event, Partial):
            assert event.changed.get("early") != 5 or not written
            known.update(event.changed)
        elif isinstance(event, ActionFinished):
            written.append(event.written)
            assert known == event.written
    assert [w["n"] for w in written] == [5, 6]


# -- leaving ----------------------------------------------------------------------------------------


async def test_nothing_runs_before_the_first_event_is_asked_for() -> None:
    hangs = Hangs()
    stream = hangs.app.astream()
    await stream.aclose()
    assert [event async for event in stream] == []
    assert hangs.runs == 0
    assert hangs.app.sequence_id == 0


@pytest.mark.parametrize("how", ["aclose", "async with", "error", "cancelled"])
async def test_leaving_cancels_the_run_and_waits_for_its_clean_up(how: str) -> None:
    hangs = Hangs()
    stream = hangs.app.astream()

    async def consume() -> None:
        async for event in stream:
            if isinstance(event, Item):
                if how == "error":
                    raise KeyError("mine")
                if how == "cancelled":
                    continue
                break

    match how:
        case "aclose":
            await consume()
            await stream.aclose()
        case "async with":
            async with stream:
                await consume()
        case "error":
            with pytest.raises(KeyError, match="mine"):
                async with stream:
                    await consume()
        case _:
            async with anyio.create_task_group() as group:

                async def leave() -> None:
                    async with stream:
                        await consume()

                group.start_soon(leave)
                await hangs.hanging.wait()
                group.cancel_scope.cancel()
    assert hangs.cleaned
    assert [event async for event in stream] == []
    with pytest.raises(MisuseError, match="was cancelled"):
        _ = stream.result
    assert (await hangs.app.arun()).state["n"] == 1


async def test_an_error_of_the_clean_up_after_its_consumer_has_left_is_logged() -> None:
    async def leaving(state: State) -> AsyncIterator[Any]:
        try:
            yield "item"
            await anyio.sleep_forever()
        finally:
            raise ConnectionError("the session was not closed")
        yield state.update(n=1)

    async with app_of(leaving).astream() as stream:
        async for event in stream:
            if isinstance(event, Item):
                break
        with capture_logs() as logs:
            await stream.aclose()
    warned = [(log["event"], log["error"]) for log in logs if log["log_level"] == "warning"]
    assert warned == [("run.failed_unread", "ConnectionError('the session was not closed')")]


@pytest.mark.usefixtures("asyncio_only")
async def test_leaving_by_asyncios_cancellation_waits_too() -> None:
    hangs = Hangs()

    async def consume() -> None:
        async with hangs.app.astream() as stream:
            async for _ in stream:
                pass

    task = asyncio.create_task(consume())
    await hangs.hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hangs.cleaned


@pytest.mark.parametrize("following", ["arun", "astep", "astream"])
@pytest.mark.parametrize("where", ["here", "thread"])
async def test_a_dropped_stream_is_cancelled_and_the_next_run_waits_for_its_clean_up(
    following: str, where: str
) -> None:
    hangs = Hangs()
    streams = [hangs.app.astream()]
    while not isinstance(await anext(streams[0]), Item):
        pass
    await hangs.hanging.wait()
    if where == "here":
        streams.clear()
    else:
        await anyio.to_thread.run_sync(streams.clear)
    gc.collect()
    assert where == "thread" or not hangs.cleaned
    match following:
        case "arun":
            await hangs.app.arun()
        case "astep":
            await hangs.app.astep()
        case _:
            assert names([event async for event in hangs.app.astream()])[-1] == "RunFinished"
    assert hangs.cleaned
    assert hangs.app.state["n"] == 1


async def test_a_second_run_beside_a_stream_is_refused() -> None:
    hangs = Hangs()
    async with hangs.app.astream() as stream:
        await anext(stream)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(
            ApplicationBusyError, match=r"what runs is an astream\(\), which `async with` or aclose\(\) ends"
        ):
            await hangs.app.arun()
        with pytest.raises(ApplicationBusyError):
            await anext(hangs.app.astream())


async def test_a_cancelled_wait_for_an_event_loses_none() -> None:
    gate = anyio.Event()

    async def gated(state: State) -> AsyncIterator[Any]:
        await gate.wait()
        yield "item"
        yield state.update(n=1)

    stream = app_of(gated).astream()
    events: list[Event] = [await anext(stream), await anext(stream)]
    for _ in range(3):
        with anyio.move_on_after(0):
            events.append(await anext(stream))
    gate.set()
    events += [event async for event in stream]
    assert names(events) == ["RunStarted", "ActionStarted", "Item", "Partial", "ActionFinished", "RunFinished"]


async def test_two_consumers_of_one_stream_are_refused() -> None:
    hangs = Hangs()
    async with hangs.app.astream() as stream:
        async with anyio.create_task_group() as group:

            async def consume() -> None:
                async for _ in stream:
                    pass

            group.start_soon(consume)
            await hangs.hanging.wait()
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(MisuseError, match="one consumer"):
                await anext(stream)
            group.cancel_scope.cancel()


async def test_a_stream_is_safe_in_anybodys_generator() -> None:
    hangs = Hangs()

    async def sse() -> AsyncIterator[str]:
        async with hangs.app.astream() as stream:
            async for event in stream:
                yield type(event).__name__  # noqa: ASYNC119 - a stream holds no scope

    lines = sse()
    assert [await anext(lines) for _ in range(3)] == ["RunStarted", "ActionStarted", "Item"]
    async with anyio.create_task_group() as group:
        group.start_soon(lines.aclose)  # type: ignore[attr-defined]
    assert hangs.cleaned


async def test_a_runtime_that_is_closed_cancels_its_runs() -> None:
    hangs = Hangs()
    events: list[Event] = []
    stream = hangs.app.astream()
    async for event in stream:
        events.append(event)
        if isinstance(event, Item):
            await hangs.hanging.wait()
            assert stream._background is not None
            stream._background.cancel()
    assert isinstance(events[-1], RunCancelled)
    assert hangs.cleaned


async def test_thousands_of_streams_at_once() -> None:
    app = app_of(counting)
    ends: list[str] = []

    async def consume() -> None:
        events = [event async for event in app.session().astream()]
        ends.append(type(events[-1]).__name__)

    async with anyio.create_task_group() as group:
        for _ in range(500):
            group.start_soon(consume)
    assert ends == ["RunFinished"] * 500


async def test_the_actions_of_a_run_are_told() -> None:
    one = action(reads=[], writes=["n"])(_one)
    app = ApplicationBuilder().with_actions(a=one, b=one).with_transitions(("a", "b")).with_entrypoint("a").build()
    events = [event async for event in app.astream(halt_after="b")]
    assert [(type(e).__name__, e.action) for e in events if isinstance(e, (ActionStarted, ActionFinished))] == [
        ("ActionStarted", "a"), ("ActionFinished", "a"), ("ActionStarted", "b"), ("ActionFinished", "b"),
    ]  # fmt: skip


async def _one(state: State) -> State:
    return state.update(n=1)


async def test_a_long_period_never_holds_up_the_run() -> None:
    @action(reads=["x"], writes=["y"])
    async def talk(state: State) -> AsyncIterator[Any]:
        for word in range(200):
            yield word
        yield state.update(y=1)

    class Talks(MapStates):
        reads, writes = ["n"], ["done"]

        def action(self, state: State, inputs: Any) -> Any:
            return talk

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return (state.update(x=x) for x in range(state["n"]))

        async def reduce(self, state: State, states: AsyncIterator[Any]) -> AsyncIterator[State]:
            count = 0
            async for _ in states:
                count += 1
                yield state.update(done=count)

    stream = ApplicationBuilder().with_actions(Talks()).with_state(n=20).build().astream(deliver=3600)
    words: dict[Any, list[Any]] = {}
    async for event in stream:
        if isinstance(event, Item):
            words.setdefault(event.path, []).extend(event.values)
    assert len(words) == 20
    assert all(said == list(range(200)) for said in words.values())
    assert stream.result.state["done"] == 20
