"""Applications: running a graph, its halts, inputs, resources, sessions and errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

import arun
from arun import (
    Application,
    ApplicationBuilder,
    ApplicationBusyError,
    ApplicationContext,
    GraphBuilder,
    MapActions,
    MisuseError,
    Result,
    RunnableGraph,
    State,
    action,
    default,
    expr,
    when,
)

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


@action(reads=["n"], writes=["n"], tags=["work"])
async def count(state: State, by: int = 1) -> tuple[dict[str, int], State]:
    return {"by": by}, state.increment(n=by)


@action(reads=["n"], writes=["text"], tags=["work", "last"])
async def show(state: State) -> tuple[str, State]:
    return "shown", state.update(text=f"n={state['n']}")


def builder(until: int = 3) -> ApplicationBuilder:
    return (
        ApplicationBuilder()
        .with_actions(count, show)
        .with_transitions(("count", "count", when(n__lt=until)), ("count", "show"))
        .with_entrypoint("count")
        .with_state(n=0)
    )


async def test_it_runs_until_no_transition_leads_on() -> None:
    app = builder().build()
    what, result, state = await app.arun()
    assert (what.name, result, state) == ("show", "shown", {"n": 3, "text": "n=3"})  # type: ignore[union-attr]
    assert app.sequence_id == 4
    assert app.state == state
    assert await app.next_action() is None
    assert not app.has_next_action()
    assert await app.astep() is None
    assert (await app.arun()).action is None


@pytest.mark.parametrize(
    ("halts", "name", "result", "n", "following"),
    [
        ({"halt_after": ["count"]}, "count", {"by": 1}, 1, "count"),
        ({"halt_after": "show"}, "show", "shown", 3, None),
        ({"halt_before": None, "halt_after": None}, "show", "shown", 3, None),
        ({"halt_after": "@tag:last"}, "show", "shown", 3, None),
        ({"halt_after": ["@tag:work"]}, "count", {"by": 1}, 1, "count"),
        ({"halt_before": ["show"]}, "show", None, 3, "show"),
        ({"halt_before": "@tag:last", "halt_after": "show"}, "show", None, 3, "show"),
        ({"halt_before": ["count"], "halt_after": ["count"]}, "count", None, 1, "count"),
    ],
)
async def test_it_halts_before_and_after_names_and_tags(
    halts: Any, name: str, result: Any, n: int, following: str | None
) -> None:
    app = builder().build()
    ended = await app.arun(**halts)
    assert ended.action is not None
    assert (ended.action.name, ended.result, ended.state["n"]) == (name, result, n)
    upcoming = app.get_next_action()
    assert (upcoming.name if upcoming else None) == following


@pytest.mark.parametrize("names", ["nowhere", ["@tag:nowhere"]])
async def test_a_halt_that_does_not_exist_is_refused_before_anything_runs(names: Any) -> None:
    app = builder().build()
    with pytest.raises(MisuseError):
        await app.arun(halt_after=names)
    with pytest.raises(MisuseError):
        app.astream(halt_before=names)
    assert app.sequence_id == 0


async def test_a_run_goes_on_where_the_last_one_halted() -> None:
    app = builder().build()
    for n in (1, 2, 3):
        assert (await app.arun(halt_after=["count"])).state["n"] == n
    assert (await app.arun()).state["text"] == "n=3"
    app.reset_to_entrypoint()
    assert (await app.arun(halt_after=["count"])).state["n"] == 4


async def test_the_state_can_be_replaced_between_steps() -> None:
    app = builder().build()
    await app.arun(halt_after=["count"])
    app.update_state(app.state.update(n=100))
    assert (await app.arun()).state["text"] == "n=100"


async def test_steps_one_by_one_and_iterated() -> None:
    app = builder().build()
    stepped = await app.astep({"by": 2})
    assert stepped is not None
    assert (stepped[0].name, stepped[1], stepped[2]["n"]) == ("count", {"by": 2}, 2)
    names = [what.name async for what, _, _ in app.aiterate(inputs={"by": 1})]
    assert names == ["count", "show"]
    names = [what.name async for what, _, _ in builder().build().aiterate(halt_before=["show"])]
    assert names == ["count"] * 3
    names = [what.name async for what, _, _ in builder().build().aiterate(halt_after=["count"])]
    assert names == ["count"]


async def test_a_condition_is_evaluated_once_a_step() -> None:
    evaluated: list[int] = []

    async def more(state: State) -> bool:
        evaluated.append(state["n"])
        await checkpoint()
        return bool(state["n"] < 3)

    app = (
        ApplicationBuilder()
        .with_actions(count, show)
        .with_transitions(("count", "count", more), ("count", "show", default))
        .with_entrypoint("count")
        .with_state(n=0)
        .build()
    )
    await app.arun(halt_before=["show"], halt_after=["show"])
    await app.next_action()
    assert evaluated == [1, 2, 3]
    await app.arun()
    app.reset_to_entrypoint()
    await app.arun(halt_after=["count"])
    other = app.session(n=0)
    await other.astep()
    with pytest.raises(MisuseError, match=r"await app.next_action\(\)"):
        other.get_next_action()


async def test_inputs_reach_every_step_that_declares_them_and_unknown_ones_are_refused() -> None:
    assert (await builder(10).build().arun(inputs={"by": 5})).state["n"] == 10
    with pytest.raises(MisuseError, match="inputs has 'bye', but no action takes it; the actions take: by"):
        await builder().build().arun(inputs={"bye": 1})
    with pytest.raises(MisuseError, match="inputs has 'bye', but no action takes it"):
        await builder().build().astep(inputs={"bye": 1})


async def test_resources_are_injected_by_name_and_never_stored() -> None:
    class Engine:
        pass

    engine = Engine()

    @action(reads=[], writes=["same"])
    async def use(state: State, engine: Engine) -> State:
        return state.update(same=engine)

    graph = GraphBuilder().with_actions(use).build()
    for what in (use, RunnableGraph(graph, "use").with_name("below")):
        app = ApplicationBuilder().with_actions(what).with_resources(engine=engine).build()
        assert (await app.arun()).state == {"same": engine}


async def test_a_missing_key_is_named_at_the_start_of_the_run() -> None:
    app = ApplicationBuilder().with_actions(count, show).with_transitions(("count", "show")).with_entrypoint("count")
    reader = action(reads=["prompt"], writes=[])(lambda state: state)
    with pytest.raises(MisuseError, match=r"reads 'prompt', which no action writes .*session\(prompt=...\)"):
        await ApplicationBuilder().with_actions(reader=reader).build().arun()
    assert (await app.build().arun()).state["n"] == 1


async def test_an_error_leaves_the_state_of_the_last_step_and_the_app_usable() -> None:
    @action(reads=["n"], writes=["n"])
    async def flaky(state: State) -> State:
        if state["n"] == 2 and not fixed:
            raise ValueError("flaky")
        return state.increment(n=1)

    fixed: list[bool] = []
    app = (
        ApplicationBuilder()
        .with_actions(flaky)
        .with_transitions(("flaky", "flaky", expr("n < 5")))
        .with_state(n=0)
        .with_identifiers(app_id="the app")
        .build()
    )
    with pytest.raises(ValueError, match="flaky") as caught:
        await app.arun()
    assert caught.value.__notes__ == ["in action 'flaky' of application 'the app', step 2"]
    assert (app.state, app.sequence_id) == ({"n": 2}, 2)
    fixed.append(True)
    assert (await app.arun()).state == {"n": 5}


async def test_two_runs_of_one_application_are_an_error() -> None:
    entered, leave = anyio.Event(), anyio.Event()

    @action(reads=[], writes=[])
    async def wait(state: State) -> State:
        entered.set()
        await leave.wait()
        return state

    app = ApplicationBuilder().with_actions(wait).build()
    async with anyio.create_task_group() as group:
        group.start_soon(app.arun)
        await entered.wait()
        for run in (app.arun, app.astep):
            with pytest.raises(ApplicationBusyError, match=r"app.session\(\) for a fresh one per run$"):
                await run()
        for change in (lambda: app.update_state(State()), app.reset_to_entrypoint):
            with pytest.raises(ApplicationBusyError):
                change()
        leave.set()
    app.reset_to_entrypoint()
    await app.arun()


async def test_sessions_share_nothing_but_the_wiring() -> None:
    app = builder().with_identifiers(app_id="first").build()
    one, two = app.session("one", n=1), app.session(n=2)
    assert (app.uid, one.uid) == ("first", "one")
    assert two.uid not in {"first", "one"}
    await one.arun(halt_after=["count"])
    assert [a.state["n"] for a in (app, one, two)] == [0, 2, 2]
    assert one.graph is two.graph


def test_a_state_where_the_app_id_belongs_is_refused() -> None:
    app = ApplicationBuilder().with_actions(count).with_state(n=0).build()
    for wrong in (State({"n": 1}), {"n": 1}, 7):
        with pytest.raises(MisuseError, match="it takes a text; fields of the State go by name"):
            app.session(wrong)  # type: ignore[arg-type]  # what is refused


async def test_thousands_of_sessions_run_at_once() -> None:
    app = builder().build()
    totals: list[int] = []

    async def one(i: int) -> None:
        totals.append((await app.session(n=-(i % 10)).arun()).state["n"])
        await checkpoint()

    async with anyio.create_task_group() as group:
        for i in range(3000):
            group.start_soon(one, i)
    assert totals == [3] * 3000


async def test_a_sub_graph_is_a_step_and_takes_inputs_and_bound_names() -> None:
    inner = builder(10)._graph.build()
    step = RunnableGraph(inner, "count", halt_after=["show"]).with_name("inner")
    app = (
        ApplicationBuilder()
        .with_actions(step, Result("text"))
        .with_transitions(("inner", "result"))
        .with_entrypoint("inner")
        .with_state(n=0, other=1)
        .build()
    )
    assert (await app.session().arun(inputs={"by": 4})).result == {"text": "n=12"}
    bound = ApplicationBuilder().with_actions(step.bind(by=6)).with_state(n=0).build()
    assert (await bound.arun()).state["text"] == "n=12"
    with pytest.raises(MisuseError, match="takes no input 'bye'"):
        step.bind(bye=1)
    with pytest.raises(MisuseError, match="no action takes it"):
        await app.session().arun(inputs={"bye": 1})


async def test_sub_graphs_nest_and_halt_where_they_are_told() -> None:
    inner = RunnableGraph(builder()._graph.build(), "count", halt_after=["count"]).with_name("inner")
    outer = RunnableGraph(GraphBuilder().with_actions(inner).build(), "inner").with_name("outer")
    app = ApplicationBuilder().with_actions(outer).with_state(n=0).build()
    assert (await app.arun()).state == {"n": 1}


@pytest.mark.parametrize("nested", [False, True])
async def test_steps_that_never_await_can_be_cancelled_and_starve_nobody(nested: bool) -> None:
    turn = action(reads=[], writes=[])(_nothing)
    graph = GraphBuilder().with_actions(a=turn, b=turn).with_transitions(("a", "b"), ("b", "a")).build()
    app = (
        ApplicationBuilder().with_actions(RunnableGraph(graph, "a")).build()
        if nested
        else ApplicationBuilder().with_graph(graph).with_entrypoint("a").build()
    )
    async with anyio.create_task_group() as group:
        group.start_soon(app.arun)
        for _ in range(3):
            await checkpoint()
        group.cancel_scope.cancel()


async def _nothing(state: State) -> State:
    return state


async def test_what_an_action_calls_can_ask_for_its_context() -> None:
    def here() -> str:
        context = ApplicationContext.get()
        return context.action_name if context is not None else "nowhere"

    @action(reads=[], writes=["seen"])
    def in_a_thread(state: State) -> State:
        return state.append(seen=here())

    @action(reads=[], writes=["seen"])
    async def streaming(state: State) -> AsyncIterator[object]:
        yield here()
        await checkpoint()
        yield state.append(seen=here())

    class Both(MapActions):
        reads, writes = [], ["seen"]

        async def actions(self, state: State, context: Any, inputs: Any) -> AsyncIterator[Any]:
            yield in_a_thread.with_name(f"{here()}/a")
            yield RunnableGraph(GraphBuilder().with_actions(streaming).build(), "streaming")

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            seen = sorted([place async for done in states for place in done["seen"]])
            return state.update(seen=[*seen, here()])

    app = ApplicationBuilder().with_actions(both=Both()).build()
    assert (await app.arun()).state["seen"] == ["both/a", "streaming", "both"]
    assert here() == "nowhere"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("run", "await app.arun"),
        ("astream_result", r"app\.astream\("),
        ("with_tracker", "with_hooks"),
        ("initialize_from", "with_store"),
        ("nonsense", "'$"),
    ],
)
def test_a_name_of_burrs_that_is_not_here_says_what_to_write(name: str, instead: str) -> None:
    made = builder()
    owner: object = made if name.startswith(("with", "init")) else made.build()
    assert not hasattr(owner, name)
    with pytest.raises(AttributeError, match=f"{type(owner).__name__}' object has no attribute '{name}.*{instead}"):
        getattr(owner, name)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("streaming_action", "@action"),
        ("SingleStepStreamingAction", "run_and_update"),
        ("PostRunStepHookAsync", "ActionFinished"),
        ("AsyncSQLitePersister", "with_store"),
        ("LocalTrackingClient", "with_hooks"),
    ],
)
def test_an_import_of_a_name_of_burrs_says_what_to_write(name: str, instead: str) -> None:
    with pytest.raises(ImportError, match=f"^arun has no '{name}', which is Burr's: .*{instead}"):
        exec(f"from arun import {name}")


def test_a_name_that_nobody_has_is_missed_as_ever() -> None:
    assert not hasattr(arun, "nonsense")
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'arun'"):
        exec("from arun import nonsense")
    from arun import data

    assert data.read_parquet


async def test_the_builder_can_build_many_that_are_apart() -> None:
    made = builder()
    first, second = made.build(), await made.with_state(n=2).abuild()
    await first.arun()
    assert second.state == {"n": 2}
    assert first.uid != second.uid
    given = State({"m": 1})
    assert made.with_state(given, k=2).build().state == {"n": 2, "m": 1, "k": 2}
    assert repr(first).startswith(f"<Application {first.uid} at step 4: <Graph count, show;")


async def test_an_abandoned_iteration_holds_nothing() -> None:
    app: Application = builder().build()
    iteration = app.aiterate()
    async for _ in iteration:
        break
    await iteration.aclose()
    assert (await app.arun()).state["n"] == 3
