"""Random trees of subtasks against a sequential model: nested fan-outs, durations, failures, retries, early exits.

Nothing may be left over after any of them: tasks, threads, generators that have begun and not ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from arun import ApplicationBuilder, Failed, Ok, Policy, Retry, State, SubGraphTask, TaskBasedParallelAction, action

pytestmark = pytest.mark.anyio


class Leaf(Struct, frozen=True):
    """Takes ``ticks`` switches of task an attempt, fails ``failures`` times, then gives ``value``."""

    value: int
    ticks: int
    failures: int


class Fan(Struct, frozen=True):
    """A fan-out over ``children``; its reducer leaves after ``leave`` results."""

    children: tuple[Any, ...]
    limit: int
    order: str
    on_error: str
    attempts: int
    leave: int


LEAVES = st.builds(Leaf, st.integers(0, 99), st.integers(0, 4), st.sampled_from([0, 0, 0, 1, 2, 9]))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.builds(
        Fan,
        st.lists(inner, max_size=6).map(tuple),
        st.integers(1, 5),
        st.sampled_from(["completed", "submitted"]),
        st.sampled_from(["skip", "collect", "fail"]),
        st.integers(1, 3),
        st.sampled_from([1, 2, 99, 99, 99]),
    ),
    max_leaves=25,
).filter(lambda tree: isinstance(tree, Fan))


class Wrong(Exception):
    """What a leaf fails with."""


class Model:
    """What a tree may give, found without running anything in parallel."""

    def result(self, node: Any, attempts: int) -> Counter[int] | None:
        """All values below, or None where it fails, if no fan is left early."""
        if isinstance(node, Leaf):
            return Counter([node.value]) if node.failures < attempts else None
        total: Counter[int] = Counter()
        for child in node.children:
            value = self.result(child, node.attempts)
            if value is None:
                if node.on_error == "fail":
                    return None
                continue
            total += value
        return total

    def possible(self, node: Any, attempts: int) -> Counter[int]:
        """All values that a leaf below may give, whatever else fails or is left early."""
        if isinstance(node, Leaf):
            return Counter([node.value] if node.failures < attempts else [])
        return sum((self.possible(child, node.attempts) for child in node.children), Counter())

    def exact(self, node: Any) -> bool:
        """Whether the result does not depend on who is first."""
        return isinstance(node, Leaf) or (
            node.leave > len(node.children) and all(self.exact(child) for child in node.children)
        )


class World:
    """Runs a tree and counts what has begun and not ended."""

    def __init__(self) -> None:
        self.open = 0
        self.running: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()

    def run(self, node: Any, fan: int = -1) -> Any:
        return self._leaf(node, fan) if isinstance(node, Leaf) else self._fan(node)

    def _leaf(self, node: Leaf, fan: int) -> Any:
        attempts = 0

        @action(reads=[], writes=["values"])
        async def leaf(state: State) -> AsyncIterator[Any]:
            nonlocal attempts
            attempts += 1
            self.open += 1
            self.running[fan] += 1
            self.peak[fan] = max(self.peak[fan], self.running[fan])
            try:
                for tick in range(node.ticks):
                    await checkpoint()
                    yield tick
                if attempts <= node.failures:
                    raise Wrong(node.value)
                yield state.update(values=[node.value])
            finally:
                self.open -= 1
                self.running[fan] -= 1

        return leaf

    def _fan(self, node: Fan) -> Any:
        world = self

        class Parallel(TaskBasedParallelAction):
            reads, writes = [], ["values"]
            policy = Policy(
                limit=node.limit,
                order=node.order,  # type: ignore[arg-type]  # a Literal, from hypothesis
                on_error=node.on_error,  # type: ignore[arg-type]  # likewise
                retry=Retry(attempts=node.attempts, initial=0, on=Wrong),
            )

            async def tasks(self, state: State, context: Any, inputs: Any) -> Any:
                world.open += 1
                try:
                    for child in node.children:
                        yield SubGraphTask(world.run(child, id(node)), state)
                finally:
                    world.open -= 1

            async def reduce(self, state: State, states: AsyncIterator[Any]) -> AsyncIterator[State]:
                world.open += 1
                try:
                    values: list[int] = []
                    yield state.update(values=[])
                    taken = 0
                    async for done in states:
                        taken += 1
                        outcome = done if node.on_error == "collect" else Ok(done)
                        if isinstance(outcome, Ok):
                            values += outcome.value["values"]
                        else:
                            assert isinstance(outcome, Failed)
                        yield state.update(values=list(values))
                        if taken >= node.leave:
                            return
                finally:
                    world.open -= 1

        return Parallel().with_name("parallel")


@given(tree=TREES)
async def test_a_random_tree_gives_what_the_model_allows_and_leaves_nothing(tree: Fan) -> None:
    world, model = World(), Model()
    app = ApplicationBuilder().with_actions(world.run(tree)).build()
    threads = working_threads()
    tasks = len(asyncio.all_tasks()) if _on_asyncio() else 0
    expected = model.result(tree, 1)
    got: Counter[int] | None
    try:
        got = Counter((await app.arun()).state["values"])
    except (Wrong, ExceptionGroup):
        got = None
    if model.exact(tree):
        assert got == expected
    elif got is not None:
        assert got <= model.possible(tree, 1)
    assert world.open == 0
    if _on_asyncio():
        assert len(asyncio.all_tasks()) == tasks
    assert not working_threads() - threads


@given(tree=TREES, after=st.integers(0, 40))
async def test_a_random_tree_cancelled_at_a_random_moment_leaves_nothing(tree: Fan, after: int) -> None:
    world = World()
    app = ApplicationBuilder().with_actions(world.run(tree)).build()
    async with anyio.create_task_group() as group:

        async def run() -> None:
            try:
                await app.arun()
            except (Wrong, ExceptionGroup):
                pass

        group.start_soon(run)
        for _ in range(after):
            await checkpoint()
        group.cancel_scope.cancel()
    assert world.open == 0


def working_threads() -> set[threading.Thread]:
    """All but the watchdog of the guard-rails, which ends a second after the last run."""
    return {thread for thread in threading.enumerate() if thread.name != "arun watchdog"}


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
