"""Random fan-outs against running one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from arun import Ok
from tests.core.parallel_programs import Each, run

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("nothing_left")]


PLAN = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["ok", "ok", "ok", "fail", "item"])), max_size=25)


@pytest.mark.parametrize("on_error", ["fail", "skip", "collect"])
@given(plan=PLAN, limit=st.integers(1, 8), order=st.sampled_from(["completed", "submitted"]), leave=st.integers(0, 30))
async def test_random_fan_outs_agree_with_running_one_after_the_other(
    on_error: str, plan: list[tuple[int, str]], limit: int, order: str, leave: int
) -> None:
    running = most = 0
    ended: list[int] = []

    async def work(i: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            for _ in range(plan[i][0]):
                await checkpoint()
            if plan[i][1] == "fail":
                raise ValueError(i)
            return i
        finally:
            running -= 1
            ended.append(i)

    async def reducer(states: AsyncIterator[Any]) -> list[Any]:
        got: list[Any] = []
        async for done in states:
            got.append(done)
            if len(got) > leave:
                break
        return got

    failing = {i for i, (_, how) in enumerate(plan) if how == "fail"}
    good = [i for i in range(len(plan)) if i not in failing]
    each = Each(work, count=len(plan), limit=limit, order=order, on_error=on_error, reducer=reducer)
    try:
        got = (await run(each))["ys"]
    except ValueError as error:
        raised: list[Any] = [error]
    except ExceptionGroup as group:
        raised = list(group.exceptions)
    else:
        raised = []
    if raised:
        assert on_error == "fail"
        assert {error.args[0] for error in raised} <= failing
        assert all(error.__notes__[0] == f"in work(i={error.args[0]})" for error in raised)
    else:
        if on_error == "collect":
            ran = [o.value["y"] if isinstance(o, Ok) else o.error.args[0] for o in got]
            assert all(isinstance(o, Ok) == (i not in failing) for o, i in zip(got, ran, strict=True))
            possible = list(range(len(plan)))
        else:
            ran, possible = [state["y"] for state in got], good
        assert len(ran) == min(len(possible), leave + 1) or (on_error == "fail" and failing)
        assert len({*ran}) == len(ran)
        assert {*ran} <= {*possible}
        if order == "submitted":
            assert ran == possible[: len(ran)]
    assert running == 0
    assert most <= limit
    assert len({*ended}) == len(ended)
