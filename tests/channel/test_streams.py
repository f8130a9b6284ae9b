from __future__ import annotations

import pytest

pytestmark = pytest.mark.anyio


async def numbers(method, payload):
    for n in range(1000):
        yield n


async def test_items_arrive_in_order(link):
    connection = await link(numbers)
    assert [n async for n in connection.open("numbers", item_type=int)] == list(range(1000))


async def test_call(link):
    async def echo(method, payload):
        yield payload

    connection = await link(echo)
    assert await connection.call("echo", {"a": [1, "b"]}) == {"a": [1, "b"]}
