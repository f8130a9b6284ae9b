"""Statistics of connections and streams: what they count is what happened."""

from __future__ import annotations

from contextlib import aclosing

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from arun.channel import Limits, memory_pair
from arun.errors import StreamRefused

pytestmark = pytest.mark.anyio


async def count_to(method, payload):
    for n in range(msgspec.msgpack.decode(payload)):
        yield n


async def test_both_ends_count_the_same(runtime):
    asking, serving = memory_pair(handler_b=count_to)
    assert len([n async for n in asking.open("count", 1000)]) == 1000
    assert await asking.call("count", 1) == 0
    here, there = asking.statistics(), serving.statistics()
    assert (here.streams_opened, there.streams_served) == (2, 2)
    assert (here.open_streams, there.served_streams) == (0, 0)
    assert (here.items_received, there.items_sent) == (1001, 1001)
    assert (here.items_sent, there.items_received) == (0, 0)
    assert here.bytes_received == there.bytes_sent > 1000
    assert there.bytes_received == here.bytes_sent > 20
    assert here.frames_received == there.frames_sent
    assert there.frames_received == here.frames_sent
    assert there.frames_sent < 1001 / 10, "items coalesce"
    assert here.waiting_bytes == there.waiting_bytes == 0
    await asking.aclose()


async def test_a_stream_tells_what_is_unread_and_what_may_still_come(runtime):
    asking, serving = memory_pair(handler_b=count_to)
    async with aclosing(asking.open("count", 100, window=10)) as stream:
        await wait_all_tasks_blocked()
        told = stream.statistics()
        assert (told.items_received, told.unread_items, told.credit_items) == (10, 10, 0)
        assert told.unread_bytes == 10
        assert told.credit_bytes == Limits().window_bytes - 10
        assert serving.statistics().without_credit == 1
        assert await anext(stream) == 0
        assert stream.statistics().unread_items == 9
        assert asking.statistics().open_streams == serving.statistics().served_streams == 1
    await asking.aclose()


async def test_items_that_come_after_the_cancel_are_counted_as_late(runtime):
    asking, serving = memory_pair(handler_b=count_to)
    stream = asking.open("count", 1000, window=1000)
    await serving_has_sent(serving, 1000)
    stream.cancel()
    await stream.aclose()
    told = asking.statistics()
    assert told.late_items + told.items_received == serving.statistics().items_sent
    await asking.aclose()


async def serving_has_sent(serving, items):
    while serving.statistics().items_sent < items:
        await anyio.lowlevel.checkpoint()


async def test_refused_streams_are_counted(runtime):
    async def wait(method, payload):
        await anyio.sleep_forever()
        yield

    asking, _ = memory_pair(handler_b=wait, limits=Limits(streams=1))
    asking.open("wait")
    for _ in range(3):
        with pytest.raises(StreamRefused):
            asking.open("wait")
    told = asking.statistics()
    assert (told.streams_opened, told.streams_refused) == (1, 3)
    await asking.aclose()


async def test_large_payloads_are_counted_once(runtime):
    async def same(method, payload):
        yield payload

    asking, serving = memory_pair(handler_b=same)
    await asking.call("same", b"x" * 1_000_000)
    await wait_all_tasks_blocked()  # a credit may be under way
    here, there = asking.statistics(), serving.statistics()
    assert (here.items_received, there.items_sent, here.items_sent) == (1, 1, 0)
    assert 1_000_000 < here.bytes_sent == there.bytes_received < 1_010_000
    await asking.aclose()
