"""Actions for the tests of executors; a module of their own, so that worker processes can import them."""

from __future__ import annotations

import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec

from arun import (
    Action,
    GraphBuilder,
    MapStates,
    MisuseError,
    RunnableGraph,
    SingleStepAction,
    State,
    action,
    expr,
    when,
)
from arun.context import ApplicationContext
from arun.registry import register


@register
class Colour(Enum):
    RED = "red"


@register
@dataclass
class Point:
    x: int
    y: tuple[int, ...]


@register
class Shape(msgspec.Struct):
    name: str
    points: list[Point]


Pair = register(namedtuple("Pair", "left right"))  # noqa: PYI024 - the untyped kind is meant


class OfTheProgram(Exception):
    """An error of a type that arun does not know."""


# -- the four kinds, each with the same result -----------------------------------------------------------------------


@action(reads=["value"], writes=["out"])
def echo_function(state: State, suffix: Any = None) -> State:
    return state.update(out=(state["value"], suffix))


@action(reads=["value"], writes=["out"])
def echo_generator(state: State, suffix: Any = None) -> Iterator[Any]:
    yield ("item", state["value"])
    yield state.update(out=None)
    yield state.update(out=(state["value"], suffix))


@action(reads=["value"], writes=["out"])
async def echo_coroutine(state: State, suffix: Any = None) -> tuple[Any, State]:
    await anyio.lowlevel.checkpoint()
    return {"result": state["value"]}, state.update(out=(state["value"], suffix))


@action(reads=["value"], writes=["out"])
async def echo_async_generator(state: State, suffix: Any = None) -> AsyncIterator[Any]:
    yield ("item", state["value"])
    yield state.update(out=None)
    await anyio.lowlevel.checkpoint()
    yield state.update(out=(state["value"], suffix))


ECHO: dict[str, Any] = {
    "function": echo_function,
    "generator": echo_generator,
    "coroutine": echo_coroutine,
    "async generator": echo_async_generator,
}


class Doubled(SingleStepAction):
    """A class action with attributes, one of which is not of a plain type."""

    reads: Sequence[str] = ["value"]
    writes: Sequence[str] = ["out"]

    def __init__(self, by: Point) -> None:
        self.by = by

    def run_and_update(self, state: State, **inputs: Any) -> State:
        return state.update(out=(state["value"], self.by, inputs.get("suffix")))

    @property
    def inputs(self) -> tuple[list[str], list[str]]:
        return [], ["suffix"]


class TwoSteps(Action):
    reads: Sequence[str] = ["value"]
    writes: Sequence[str] = ["out"]

    def run(self, state: State) -> Any:
        return {"v": state["value"]}

    def update(self, result: Any, state: State) -> State:
        return state.update(out=(result["v"], None))


# -- failures --------------------------------------------------------------------------------------------------------


def _raise(what: str) -> None:
    if what == "value":
        error = ValueError("bad value", 7)
        error.add_note("a note of the action's")
        raise error
    if what == "file":
        raise FileNotFoundError(2, "No such file", "/nowhere")
    if what == "key":
        raise KeyError("k")
    if what == "caused":
        try:
            raise ZeroDivisionError("inner")
        except ZeroDivisionError as exc:
            raise RuntimeError("outer") from exc
    if what == "group":
        raise ExceptionGroup("several", [ValueError("one"), OfTheProgram("two")])
    if what == "own":
        raise OfTheProgram("odd")
    if what == "misuse":
        raise MisuseError("misused")


@action(reads=["what"], writes=["out"])
def fail_function(state: State) -> State:
    _raise(state["what"])
    return state.update(out=state["what"])


@action(reads=["what"], writes=["out"])
def fail_generator(state: State) -> Iterator[Any]:
    yield "before"
    _raise(state["what"])
    yield state.update(out=state["what"])


@action(reads=["what"], writes=["out"])
async def fail_coroutine(state: State) -> State:
    _raise(state["what"])
    return state.update(out=state["what"])


@action(reads=["what"], writes=["out"])
async def fail_async_generator(state: State) -> AsyncIterator[Any]:
    yield "before"
    _raise(state["what"])
    yield state.update(out=state["what"])


FAIL: dict[str, Any] = {
    "function": fail_function,
    "generator": fail_generator,
    "coroutine": fail_coroutine,
    "async generator": fail_async_generator,
}


@action(reads=["value"], writes=["out"])
def read_undeclared(state: State) -> State:
    return state.update(out=state["other"])


@action(reads=["value"], writes=["out"])
def write_undeclared(state: State) -> State:
    return state.update(out=1, extra=2)


@action(reads=["value"], writes=["out"])
def write_nothing(state: State) -> State:
    return state


@action(reads=[], writes=["out", "value"])
def wipe(state: State) -> State:
    return state.update(out=1).wipe(delete=["value"])


# -- cancellation: each says in `fifo` that it has begun, and in `cleaned` that it has cleaned up --------------------


def _say(path: str) -> None:
    with open(path, "w") as fifo:
        fifo.write("begun\n")


@action(reads=["folder"], writes=["out"])
def hold_function(state: State) -> State:
    folder = Path(state["folder"])
    _say(state["folder"] + "/begun")
    while not (folder / "enough").exists():
        time.sleep(0.005)
    (folder / "cleaned").touch()
    return state.update(out=1)


@action(reads=["folder"], writes=["out"])
def hold_generator(state: State) -> Iterator[Any]:
    try:
        _say(state["folder"] + "/begun")
        while True:
            yield "tick"
            time.sleep(0.005)
    finally:
        (Path(state["folder"]) / "cleaned").touch()


@action(reads=["folder"], writes=["out"])
async def hold_coroutine(state: State) -> State:
    try:
        await anyio.to_thread.run_sync(_say, state["folder"] + "/begun")
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.02)
        (Path(state["folder"]) / "cleaned").touch()
    return state.update(out=1)


@action(reads=["folder"], writes=["out"])
async def hold_async_generator(state: State) -> AsyncIterator[Any]:
    try:
        await anyio.to_thread.run_sync(_say, state["folder"] + "/begun")
        yield "tick"
        await anyio.sleep_forever()
        yield state.update(out=1)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.02)
        (Path(state["folder"]) / "cleaned").touch()


HOLD: dict[str, Any] = {
    "function": hold_function,
    "generator": hold_generator,
    "coroutine": hold_coroutine,
    "async generator": hold_async_generator,
}


@action(reads=["folder"], writes=["out"])
async def never_cleans_up(state: State) -> State:
    try:
        await anyio.to_thread.run_sync(_say, state["folder"] + "/begun")
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.sleep_forever()
    return state.update(out=1)


@action(reads=["folder"], writes=["out"])
async def blocks_its_loop(state: State) -> State:
    _say(state["folder"] + "/begun")
    while True:  # noqa: ASYNC913 - the mistake that the test is about
        time.sleep(0.01)  # noqa: ASYNC251 - the mistake that the test is about
    return state.update(out=1)


# -- what a subtask knows of where it runs ---------------------------------------------------------------------------

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


@action(reads=[], writes=["out"])
def tell_place(state: State) -> Iterator[Any]:
    threads = {threading.get_ident()}
    yield "item"
    threads.add(threading.get_ident())
    out = {"pid": os.getpid(), "threads": len(threads), "main": threading.current_thread() is threading.main_thread()}
    yield state.update(out=out)


@action(reads=[], writes=["out"], blocking=False)
def tell_place_inline(state: State) -> State:
    return state.update(out={"main": threading.current_thread() is threading.main_thread()})


@action(reads=[], writes=["out"])
def tell_variable(state: State) -> State:
    seen = VARIABLE.get()
    VARIABLE.set("by the subtask")
    return state.update(out=seen)


@action(reads=["wanted"], writes=["out"])
def tell_context(state: State, __context: ApplicationContext) -> State:
    context = __context
    assert ApplicationContext.get() is context
    out = (context.app_id, context.action_name, context.path, dict(context.inputs), context.partition_key)
    return state.update(out=out)


@action(reads=[], writes=["out"])
def use_engine(state: State, engine: Any = "none") -> State:
    return state.update(out=engine)


_lock = threading.Lock()
_now = 0
_most = 0


@action(reads=["value"], writes=["out"])
def count_at_once(state: State) -> State:
    global _now, _most
    with _lock:
        _now += 1
        _most = max(_most, _now)
        most = _most
    time.sleep(0.005)
    with _lock:
        _now -= 1
    return state.update(out=(os.getpid(), most))


def reset_count() -> None:
    global _most
    _most = 0


# -- deaths and prints -----------------------------------------------------------------------------------------------


@action(reads=["how"], writes=["out"])
def die(state: State) -> State:
    how = state["how"]
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "close":
        os.closerange(3, 100)
    return state.update(out=os.getpid())


@action(reads=["value"], writes=["out"])
def speak(state: State) -> State:
    print("said", state["value"])
    print("complained", state["value"], file=sys.stderr)
    return state.update(out=1)


@action(reads=["value"], writes=["out"])
async def pour(state: State) -> AsyncIterator[Any]:
    """Yield numbers, and count in a file how many."""
    for n in range(1000):
        Path(state["value"]).write_text(str(n))  # noqa: ASYNC240 - a file in memory, mostly
        yield n
    yield state.update(out=1)


@action(reads=[], writes=["out"])
def start_program(state: State) -> State:
    return state.update(out=subprocess.Popen(["sleep", "1000"]).pid)


@action(reads=[], writes=["out"])
def give_object(state: State) -> State:
    return state.update(out=object())


@action(reads=[], writes=["out"])
def give_object_item(state: State) -> Iterator[Any]:
    yield object()
    yield state.update(out=1)


@action(reads=["folder", "own_process"], writes=["out"])
def flaky(state: State) -> Iterator[Any]:
    """Fail twice, the second time with the whole process where it has one of its own."""
    marks = Path(state["folder"]) / "attempts"
    attempt = len(marks.read_text()) + 1 if marks.exists() else 1
    marks.write_text("x" * attempt)
    yield attempt
    if attempt == 1:
        raise ConnectionError("for now")
    if attempt == 2:
        if state["own_process"]:
            os._exit(1)
        raise ConnectionError("again")
    yield state.update(out=attempt)


# -- graphs ----------------------------------------------------------------------------------------------------------


@action(reads=["n"], writes=["n", "log"])
def add_one(state: State, step: int = 1) -> Iterator[Any]:
    yield f"n was {state['n']}"
    yield state.update(n=state["n"] + step).append(log=os.getpid())


@action(reads=["n"], writes=["out"])
async def tell_n(state: State) -> State:
    return state.update(out=state["n"])


@action(reads=["n"], writes=["out"])
def tell_n_plainly(state: State) -> State:
    return state.update(out=state["n"])


async def is_odd(state: State) -> bool:
    return bool(state["n"] % 2)


def counting_graph(last: Any) -> RunnableGraph:
    graph = (
        GraphBuilder()
        .with_actions(add=add_one, tell=last)
        .with_transitions(("add", "add", is_odd), ("add", "add", expr("n < limit") & ~when(stop=True)), ("add", "tell"))
        .build()
    )
    return RunnableGraph(graph, "add", ["tell"])


class Inner(MapStates):
    """A parallel action as a subtask."""

    reads: Sequence[str] = ["value"]
    writes: Sequence[str] = ["out"]

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return tell_place

    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        return [state, state]

    async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
        return state.update(out=[os.getpid(), *[done["out"]["pid"] async for done in states]])
