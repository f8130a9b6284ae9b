"""Rows 2 and 3: generators that are dropped, and generators that refuse to end."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from arun import Item, MapStates, MisuseError, State, action
from arun.context import Run
from arun.errors import AbandonedGenerator
from tests.guards.programs import app_of, place

pytestmark = pytest.mark.anyio

var: ContextVar[str] = ContextVar("var", default="unset")


class Rows:
    """Makes generators that tell where they were closed."""

    def __init__(self) -> None:
        self.closed: list[tuple[Any, str]] = []

    async def rows(self) -> AsyncIterator[int]:
        token = var.set("inside")
        try:
            for i in range(9):
                yield i  # here
        finally:
            await checkpoint()
            self.closed.append((anyio.get_current_task().id, var.get()))
            var.reset(token)  # fails in another context


async def test_break_without_closing_is_closed_at_the_end_of_the_action_in_its_task_and_context() -> None:
    made = Rows()

    @action(reads=[], writes=["task"])
    async def crawl(state: State) -> State:
        async for _ in made.rows():
            break
        assert not made.closed
        return state.update(task=anyio.get_current_task().id)

    with pytest.warns(AbandonedGenerator, match=r"action 'crawl' dropped Rows.rows at .*aclosing\(rows") as caught:
        state = (await app_of(crawl).arun()).state
    assert made.closed == [(state["task"], "inside")]
    (warning,) = caught
    assert f"{warning.filename}:{warning.lineno}" == place(Rows.rows)
    assert issubclass(AbandonedGenerator, ResourceWarning)


async def test_an_inner_generator_that_its_outer_one_drops_is_closed_with_it() -> None:
    made = Rows()

    @action(reads=[], writes=[])
    async def crawl(state: State) -> AsyncIterator[Any]:
        async for row in made.rows():
            yield row
            if row == 3:
                break
        yield state

    with pytest.warns(AbandonedGenerator, match="action 'crawl' dropped Rows.rows"):
        await app_of(crawl).arun()
    assert [context for _, context in made.closed] == ["inside"]


async def test_what_a_subtask_and_a_reducer_drop_is_theirs() -> None:
    made = Rows()

    @action(reads=[], writes=["y"])
    async def dropping(state: State) -> State:
        async for _ in made.rows():
            break
        return state.update(y=1)

    class Each(MapStates):
        writes = ("y",)

        def action(self, state: State, inputs: Any) -> Any:
            return dropping

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state]

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            async for _ in states:
                async for _ in made.rows():
                    break
            return state.update(y=1)

    with pytest.warns(AbandonedGenerator) as caught:
        await app_of(Each()).arun()
    assert [str(one.message).split(" dropped")[0] for one in caught] == ["dropping()", "action 'Each'"]
    assert [context for _, context in made.closed] == ["inside"] * 2


async def test_an_error_in_the_clean_up_of_a_dropped_generator_is_raised_by_the_action() -> None:
    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise OSError("clean-up")

    @action(reads=[], writes=[])
    async def crawl(state: State) -> State:
        async for _ in rows():
            break
        return state

    with pytest.warns(AbandonedGenerator), pytest.raises(OSError, match="clean-up"):
        await app_of(crawl).arun()


async def test_an_action_that_fails_or_is_cancelled_inside_a_loop_closes_it_without_a_warning() -> None:
    made = Rows()

    @action(reads=["wait"], writes=[])
    async def crawl(state: State) -> State:
        async for _ in made.rows():
            if state["wait"]:
                await anyio.sleep_forever()
            raise LookupError("its own")
        return state

    with pytest.raises(LookupError, match="its own"):
        await app_of(crawl, wait=False).arun()
    assert len(made.closed) == 1
    with anyio.move_on_after(0.01):
        await app_of(crawl, wait=True).arun()
    assert [context for _, context in made.closed] == ["inside"] * 2


async def test_generators_that_are_closed_exhausted_or_kept_are_nobodys_business() -> None:
    made = Rows()
    kept = []

    @action(reads=[], writes=[])
    async def careful(state: State) -> State:
        async with aclosing(made.rows()) as rows:
            async for _ in rows:
                break
        assert len([row async for row in made.rows()]) == 9
        kept.append(made.rows())
        await anext(kept[0])
        return state

    @action(reads=[], writes=[])
    async def later(state: State) -> State:
        await anext(kept[0])
        return state

    await app_of(careful, later).arun()
    assert len(made.closed) == 2
    with pytest.raises(ValueError, match="different Context"):  # it is the caller's to close
        await kept[0].aclose()


async def test_code_outside_of_actions_keeps_the_event_loops_hooks(anyio_backend_name: str) -> None:
    before = sys.get_asyncgen_hooks()

    @action(reads=[], writes=[])
    async def step(state: State) -> State:
        assert sys.get_asyncgen_hooks() != before
        return state

    await app_of(step).arun()
    assert sys.get_asyncgen_hooks() == before


# -- generators that refuse to end --------------------------------------------------------------------------


async def in_finally(state: State) -> AsyncIterator[Any]:
    try:
        yield state
    finally:
        yield state  # here


async def in_bare_except(state: State) -> AsyncIterator[Any]:
    try:
        yield state
    except:  # noqa: E722 - the mistake
        yield state  # here


async def in_base_except(state: State) -> AsyncIterator[Any]:
    while True:
        try:
            yield state
        except (KeyError, BaseException):
            yield state  # here


def in_plain_finally(state: State) -> Iterator[Any]:
    try:
        yield state
    finally:
        yield state  # here


@pytest.mark.parametrize("function", [in_finally, in_bare_except, in_base_except, in_plain_finally])
def test_yield_where_the_generator_is_being_closed_is_refused_where_it_is_declared(function: Any) -> None:
    with pytest.raises(MisuseError, match=f"{function.__name__} yields at") as caught:
        action(reads=[], writes=[])(function)
    assert place(function) in str(caught.value)


@pytest.fixture
def collected() -> Iterator[None]:
    """What a test leaves to the garbage collector is collected in its own name, and not in that of a later test."""
    yield
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python's word for the same
@pytest.mark.usefixtures("collected")
async def test_a_generator_that_swallows_generator_exit_is_named_with_its_line() -> None:
    @action(reads=[], writes=[])
    async def stubborn(state: State) -> AsyncIterator[Any]:
        try:
            yield "item"
        except BaseException:
            state = state.update()
        yield state  # here

    class Full:
        """A listener that takes no items."""

        full = False

        async def room(self, kind: object) -> None:
            return

        def put(self, event: Any) -> None:
            if isinstance(event, Item):
                raise ConnectionError("nobody listens")

    with pytest.raises(MisuseError, match=r"stubborn at .* swallowed GeneratorExit") as caught:
        await app_of(stubborn)._step(Run(Full()), {})
    assert place(test_a_generator_that_swallows_generator_exit_is_named_with_its_line) in str(caught.value)
    assert isinstance(caught.value.__cause__.__context__, ConnectionError)


async def test_a_source_that_swallows_generator_exit_is_told_though_its_reducer_has_ended() -> None:
    over: list[bool] = []

    class Stubborn(MapStates):
        reads, writes = (), ("n",)

        def action(self, state: State, inputs: Any) -> Any:
            return count

        async def states(self, state: State, context: Any, inputs: Any) -> AsyncIterator[State]:
            while True:
                try:
                    yield state  # here
                except BaseException:
                    if over:
                        raise

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            async for done in states:
                return done
            raise AssertionError

    @action(reads=[], writes=["n"])
    async def count(state: State) -> State:
        return state.update(n=1)

    with pytest.raises(MisuseError, match=r"states at .* yielded when it was told to end") as caught:
        await app_of(Stubborn()).arun()
    over.append(True)
    test = test_a_source_that_swallows_generator_exit_is_told_though_its_reducer_has_ended
    assert place(test) in str(caught.value)


def test_excepts_that_let_the_generator_end_are_let_through() -> None:
    async def fine(state: State) -> AsyncIterator[Any]:
        try:
            yield 1
        except Exception:
            yield 2
        except BaseException:
            raise
        finally:
            print("closed")
        yield state

    action(reads=[], writes=[])(fine)
