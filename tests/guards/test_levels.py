"""The four levels, what "strict" finds (rows 19 and 21), and the pytest plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint

from arun import ApplicationBuilder, MapStates, MisuseError, MisuseWarning, Runtime, State, action, fan_out
from arun.guards import default_level, set_default_level
from tests.guards.programs import app_of, place, raised_at

pytestmark = pytest.mark.anyio
make_scope = anyio.CancelScope


@action(reads=[], writes=["n"])
async def in_scope(state: State) -> AsyncIterator[Any]:
    scope = make_scope()
    with scope:
        yield state.update(n=1)  # here


def in_scope_at() -> str:
    return place(in_scope.function)


async def test_warn_warns_at_the_users_line_and_goes_on() -> None:
    with pytest.warns(MisuseWarning, match="in_scope yielded at .* inside a CancelScope") as caught:
        assert (await app_of(in_scope, check="warn").arun()).state["n"] == 1
    assert [f"{one.filename}:{one.lineno}" for one in caught] == [in_scope_at()]


async def test_off_looks_for_nothing() -> None:
    @action(reads=[], writes=[])
    async def dropping(state: State) -> State:
        async def rows() -> AsyncIterator[int]:
            yield 1

        async for _ in rows():
            break
        return state

    assert (await app_of(in_scope, check="off").arun()).state["n"] == 1
    if sys.get_asyncgen_hooks().finalizer is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # trio's own, for what it has to finalise
        await app_of(dropping, check="off").arun()
        await checkpoint()


async def test_error_is_the_default_and_strict_is_no_milder() -> None:
    for app in (ApplicationBuilder().with_actions(in_scope).build(), app_of(in_scope, check="strict")):
        with pytest.raises(MisuseError) as caught:
            await app.arun()
        assert raised_at(caught.value) == in_scope_at()


def test_a_level_that_there_is_not() -> None:
    with pytest.raises(MisuseError, match="check='loud': the levels are 'off', 'warn', 'error', 'strict'"):
        ApplicationBuilder().with_check("loud")  # type: ignore[arg-type]  # the mistake
    with pytest.raises(MisuseError, match="a number of seconds above 0"):
        ApplicationBuilder().with_check("error", blocked_after=0)


async def test_the_level_reaches_subtasks_and_what_they_fan_out() -> None:
    @action(reads=[], writes=["n"])
    async def fanning(state: State) -> State:
        async def source() -> AsyncIterator[Any]:
            scope = make_scope()
            with scope:
                yield checkpoint()

        return state.update(n=len([one async for one in fan_out(source())]))

    class Each(MapStates):
        writes = ("n",)

        def action(self, state: State, inputs: Any) -> Any:
            return fanning

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state]

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(n=sum([done["n"] async for done in states]))

    async with Runtime():
        with pytest.raises(MisuseError, match="source yielded"):
            await app_of(Each()).arun()
        with pytest.warns(MisuseWarning, match="source yielded"):
            await app_of(Each(), check="warn").arun()
        assert (await app_of(Each(), check="off").arun()).state["n"] == 1
        outcomes = fan_out(_awaitables(in_scope.function(State())), check="warn")
        with pytest.warns(MisuseWarning, match="in_scope yielded"):
            await anext(outcomes)
        await outcomes.aclose()


async def _awaitables(items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for _ in items:
        yield checkpoint()


def test_declarations_are_held_to_the_default_level(arun_level: Any) -> None:
    async def bad(state: State) -> AsyncIterator[Any]:
        with anyio.fail_after(1):
            yield state  # here

    arun_level("warn")
    with pytest.warns(MisuseWarning, match="bad yields at") as caught:
        action(reads=[], writes=[])(bad)
    assert f"{caught[0].filename}:{caught[0].lineno}" == place(test_declarations_are_held_to_the_default_level)
    arun_level("off")
    action(reads=[], writes=[])(bad)
    arun_level("strict")
    with pytest.raises(MisuseError):
        action(reads=[], writes=[])(bad)


@pytest.fixture
def arun_level() -> Any:
    before = set_default_level(None)
    yield set_default_level
    set_default_level(before)


def test_the_environment_sets_the_default_level(arun_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARUN_CHECK", raising=False)
    assert default_level() == "error"
    monkeypatch.setenv("ARUN_CHECK", "warn")
    assert default_level() == "warn"
    monkeypatch.setenv("ARUN_CHECK", "never")
    with pytest.raises(MisuseError, match="ARUN_CHECK='never'"):
        default_level()


# -- strict -------------------------------------------------------------------------------------------------------


class Record(msgspec.Struct):
    tags: list[str]


async def test_a_state_that_is_changed_in_place() -> None:
    @action(reads=["xs"], writes=["n"])
    async def appending(state: State) -> State:
        state["xs"].append(1)
        return state.update(n=1)

    @action(reads=["deep"], writes=["n"])
    def nested(state: State) -> State:
        state["deep"][0]["record"].tags.append("new")
        return state.update(n=1)

    deep = ({"record": Record(tags=[])},)
    for step, key in ((appending, "xs"), (nested, "deep")):
        for level in ("error", "off", "warn"):
            await app_of(step, xs=[], deep=deep, check=level).arun()
        with pytest.raises(MisuseError, match=rf"state\['{key}'\] was changed in place while action '{step.name}' ran"):
            await app_of(step, xs=[], deep=deep, check="strict").arun()


async def test_a_state_that_a_subtask_changes_in_place() -> None:
    @action(reads=["xs"], writes=["y"])
    async def appending(state: State) -> State:
        state["xs"].append(1)
        return state.update(y=1)

    class Each(MapStates):
        reads, writes = ("xs",), ("y",)

        def action(self, state: State, inputs: Any) -> Any:
            return appending

        def states(self, state: State, context: Any, inputs: Any) -> Any:
            return [state]

        async def reduce(self, state: State, states: AsyncIterator[State]) -> State:
            return state.update(y=len([done async for done in states]))

    with pytest.raises(MisuseError, match=r"state\['xs'\] was changed in place while action 'appending' ran"):
        await app_of(Each(), xs=[], check="strict").arun()


async def test_the_same_object_yielded_again_and_changed() -> None:
    @action(reads=[], writes=["got"])
    async def items(state: State) -> AsyncIterator[Any]:
        got: list[int] = []
        for i in range(3):
            got.append(i)
            yield got  # item
        yield state.update(got=list(got))

    @action(reads=[], writes=["got"])
    async def partials(state: State) -> AsyncIterator[Any]:
        got: list[int] = []
        for i in range(3):
            got.append(i)
            yield state.update(got=got)  # partial

    for step, what, marker in ((items, "the same list", "# item"), (partials, r"state\['got'\]", "# partial")):
        await app_of(step, check="error").arun()
        with pytest.raises(
            MisuseError, match=f"yielded {what} a second time, changed in place.*yield a copy"
        ) as caught:
            await app_of(step, check="strict").arun()
        assert raised_at(caught.value) == place(step.function, marker)


async def test_strict_lets_what_is_right_through() -> None:
    class Client:
        def __init__(self) -> None:
            self.calls: list[int] = []

    @action(reads=["xs", "client", "cache"], writes=["xs", "n"])
    async def step(state: State) -> AsyncIterator[Any]:
        state["client"].calls.append(1)
        same = ["a"]
        yield same
        yield same  # unchanged
        got: list[int] = []
        for i in range(3):
            got = [*got, i]
            yield got
            yield state.append(xs=i).update(n=tuple(got))

    @action(reads=["xs"], writes=["xs"])
    async def after(state: State) -> State:
        return state.extend(xs=[4, 5]).update(xs=sorted(state["xs"]))

    app = app_of(step, after, xs=[], client=Client(), cache={"a": [1.5, float("nan")], 1: {2, 3}}, check="strict")
    assert (await app.arun()).state["xs"] == [2]


# -- pytest -------------------------------------------------------------------------------------------------------


def run_pytest(folder: Path, test: str, ini: str = "") -> str:
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    (folder / "test_it.py").write_text(textwrap.dedent(test))
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "arun.testing.plugin", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    return done.stdout + done.stderr


def test_the_plugin_makes_strict_the_default(tmp_path: Path) -> None:
    test = """
        from arun.guards import default_level

        def test_default():
            assert default_level() == "{}"

        def test_one(arun_check):
            arun_check("off")
            arun_check("warn")
            assert default_level() == "warn"

        def test_default_again():
            assert default_level() == "{}"
    """
    assert "3 passed" in run_pytest(tmp_path, test.format("strict", "strict"))
    assert "3 passed" in run_pytest(tmp_path, test.format("error", "error"), "arun_check = error")


def test_a_level_that_there_is_not_in_the_ini_file_is_an_error_of_usage(tmp_path: Path) -> None:
    said = run_pytest(tmp_path, "", "arun_check = errors")
    assert said.strip() == (
        "ERROR: ini option arun_check: check='errors': the levels are 'off', 'warn', 'error', 'strict'"
    )


def test_the_plugin_loads_nothing_heavy() -> None:
    program = "import sys, arun.testing.plugin; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"trio", "ray", "vllm", "torch", "numpy", "hypothesis"} & set(loaded)
