"""Class actions, as Burr has them, and the variants of actions that bind and with_name make."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, ClassVar

import pytest
from anyio.lowlevel import checkpoint

from arun import (
    Action,
    ApplicationBuilder,
    ApplicationContext,
    Input,
    MisuseError,
    Result,
    Runtime,
    SingleStepAction,
    State,
)
from tests.core.action_programs import app_of, items_of, run, scaled

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


# -- class actions ---------------------------------------------------------------------------------


class Add(Action):
    @property
    def reads(self) -> list[str]:  # type: ignore[override]
        return ["n"]

    @property
    def writes(self) -> list[str]:  # type: ignore[override]
        return ["n"]

    def update(self, result: Any, state: State) -> State:
        return state.update(**result)


class AddCoroutine(Add):
    async def run(self, state: State, by: int = 1) -> dict[str, int]:  # type: ignore[override]
        return {"n": state["n"] + by}


class AddFunction(Add):
    threads: ClassVar[list[int]] = []

    def run(self, state: State, by: int = 1) -> dict[str, int]:  # type: ignore[override]
        self.threads.append(threading.get_ident())
        return {"n": state["n"] + by}


class AddStreaming(Add):
    async def run(self, state: State, by: int = 1) -> AsyncIterator[dict[str, int]]:  # type: ignore[override]
        yield {"n": 0}
        yield {"n": state["n"] + by}


class AddStepped(Add):
    def run(self, state: State, by: int = 1) -> Iterator[dict[str, int]]:  # type: ignore[override]
        yield {"n": 0}
        yield {"n": state["n"] + by}


class AddAsBurrWritesIt(Add):
    """Inputs named in a property, taken in **run_kwargs."""

    @property
    def inputs(self) -> list[str]:
        return ["by"]

    async def run(self, state: State, **run_kwargs: Any) -> dict[str, int]:
        return {"n": state["n"] + run_kwargs["by"]}


class AddWithAsyncUpdate(AddCoroutine):
    async def update(self, result: Any, state: State) -> State:  # type: ignore[override]
        await checkpoint()
        return state.update(**result)


class AddInOneStep(SingleStepAction):
    reads, writes = ["n"], ["n"]

    async def run_and_update(self, state: State, by: int = 1) -> tuple[dict[str, int], State]:  # type: ignore[override]
        return {"n": state["n"] + by}, state.increment(n=by)


class AddInOneStepOpen(SingleStepAction):
    reads, writes = ["n"], ["n"]

    @property
    def inputs(self) -> tuple[Sequence[str], Sequence[str]]:
        return [], ["by"]

    def run_and_update(self, state: State, **inputs: Any) -> State:
        return state.increment(n=inputs["by"])


ADDERS = [
    AddCoroutine, AddFunction, AddStreaming, AddStepped, AddAsBurrWritesIt, AddWithAsyncUpdate, AddInOneStep,
    AddInOneStepOpen,
]  # fmt: skip


@pytest.mark.parametrize("kind", ADDERS)
async def test_class_actions_of_every_kind_run_and_update(kind: type[Action]) -> None:
    assert await run(kind().with_name("add"), inputs={"by": 4}, n=1) == {"n": 5}
    assert await run(kind().bind(by=3), n=1) == {"n": 4}


async def test_a_class_actions_items_are_streamed_but_the_last_which_is_its_result(runtime: Runtime) -> None:
    assert await items_of(AddStreaming(), n=1) == [{"n": 0}]
    assert await items_of(AddStepped(), n=1) == [{"n": 0}]
    assert (await app_of(AddStreaming(), n=1).arun()).result == {"n": 2}


async def test_a_class_actions_function_runs_in_a_thread() -> None:
    await run(AddFunction(), n=1)
    assert AddFunction.threads[-1] != threading.get_ident()


async def test_an_incomplete_class_action_says_what_is_missing() -> None:
    with pytest.raises(MisuseError, match=r"defines neither run\(\) nor"):
        await run(Action())

    class NoState(AddCoroutine):
        def update(self, result: Any, state: State) -> Any:
            return result

    with pytest.raises(MisuseError, match=r"update\(\) returned dict"):
        await run(NoState(), n=1)


def test_a_name_where_a_list_of_names_is_meant_is_refused_in_the_class_body() -> None:
    with pytest.raises(MisuseError, match=r"Answer: writes='out'; a list of names is meant: writes=\['out'\]"):
        type("Answer", (Action,), {"reads": [], "writes": ("out")})  # where ("out",) is meant


async def test_a_streaming_action_of_burrs_is_told_what_to_rename() -> None:
    class Chat(Add):
        async def stream_run(self, state: State) -> AsyncIterator[dict[str, int]]:
            yield {"n": 1}

    with pytest.raises(MisuseError, match=r"Chat defines neither run\(\) .*; rename its stream_run\(\) to run\(\)"):
        await run(Chat(), n=1)


async def test_a_method_gets_the_context_though_python_renames_its_parameter() -> None:
    class Where(Action):
        reads, writes = [], ["where"]

        async def run(self, state: State, __context: ApplicationContext) -> str:  # type: ignore[override]  # run() takes any inputs
            return __context.action_name

        def update(self, result: Any, state: State) -> State:
            return state.update(where=result)

    class _WhereElse(SingleStepAction):
        reads, writes = [], ["where"]

        def run_and_update(self, state: State, __context: ApplicationContext) -> State:  # type: ignore[override]  # as above
            return state.update(where=__context.action_name)

    class Inherited(_WhereElse):
        pass

    for kind in (Where, _WhereElse, Inherited):
        assert await run(kind().with_name("here")) == {"where": "here"}
        assert kind().input_names == (frozenset(), frozenset())


async def test_input_and_result_are_actions() -> None:
    app = (
        ApplicationBuilder()
        .with_actions(Input("prompt", "n"), Result("prompt"))
        .with_transitions(("input", "result"))
        .with_entrypoint("input")
        .build()
    )
    what, result, state = await app.arun(inputs={"prompt": "Hi", "n": 1})
    assert (what.name, result, state["n"]) == ("result", {"prompt": "Hi"}, 1)  # type: ignore[union-attr]


def test_input_and_result_have_burrs_methods() -> None:
    given, wanted = Input("prompt", "n"), Result("prompt")
    assert (given.reads, given.writes, given.inputs) == ([], ["prompt", "n"], ["prompt", "n"])
    assert given.update(given.run(State(), prompt="Hi", n=1), State()) == {"prompt": "Hi", "n": 1}
    assert (wanted.reads, wanted.writes) == (["prompt"], [])
    assert wanted.run(State({"prompt": "Hi", "n": 1})) == {"prompt": "Hi"}
    assert wanted.update({}, State({"n": 1})) == {"n": 1}


# -- bind and with_name ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", [scaled, AddCoroutine()])
async def test_bind_and_with_name_chain_in_any_order_and_never_mutate(base: Action) -> None:
    before = dict(vars(base))
    for made in (base.bind(by=3).with_name("x"), base.with_name("x").bind(by=3), base.with_name("y").with_name("x")):
        assert made.name == "x"
        assert made.display_name == made.scope.action == "x"
    rebound = base.bind(by=1).bind(by=4)
    assert (await run(rebound, n=0))["n"] == 4
    assert {k: v for k, v in vars(base).items() if k in before} == before
    assert base.bound == {}


async def test_a_bound_input_is_no_input_any_more() -> None:
    assert scaled.inputs == (["by"], ["scale"])
    assert scaled.bind(by=1).inputs == ([], ["scale"])
    with pytest.raises(MisuseError, match="no action takes it"):
        await run(scaled.bind(by=1), inputs={"by": 2})


@pytest.mark.parametrize("base", [scaled, AddCoroutine(), AddAsBurrWritesIt()])
def test_binding_a_name_that_is_not_taken_names_the_nearest(base: Action) -> None:
    with pytest.raises(MisuseError, match=r"takes no input 'byy' \(did you mean 'by'\?\)"):
        base.bind(byy=1)


async def test_calling_an_action_calls_its_function() -> None:
    assert (await scaled(State(), by=2))["n"] == 2
    assert (await scaled.bind(by=2, scale=3)(State()))["n"] == 6
    assert "async" not in repr(scaled)
    assert repr(scaled).startswith("<Action scaled (coroutine scaled at ")
