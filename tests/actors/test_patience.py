"""What an event loop that stood still itself may say about others."""

from __future__ import annotations

import time

import anyio
import pytest
from anyio.lowlevel import checkpoint

from actors.members.patience import within

pytestmark = pytest.mark.anyio


async def test_what_came_while_the_event_loop_stood_still_is_found() -> None:
    asked = 0

    async def ask() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            time.sleep(1.5)  # noqa: ASYNC251 - as a blocking call, a debugger or a pause of the machine does
        for _ in range(3):  # whatever came is read in some turns of the event loop
            await checkpoint()
        return "here"

    assert await within(1.0, ask) == "here"
    assert asked == 2


async def test_nothing_within_the_time_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        await within(0.01, anyio.sleep_forever)
    with pytest.raises(TimeoutError):
        await within(1.0, anyio.sleep_forever)
