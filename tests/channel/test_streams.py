"""Streams, over every transport and on both backends: order, types, credit, cancel, large payloads."""

from __future__ import annotations

import gc
import re
import threading
from contextlib import aclosing

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from arun.channel import Limits
from arun.channel.serving import CHECKPOINT_ITEMS
from arun.errors import (
    ChannelLost,
    MisuseError,
    PayloadError,
    StreamRefused,
)

pytestmark = pytest.mark.anyio


class Point(msgspec.Struct):
    x: int
    y: int


async def count_to(method, payload):
    for n in range(msgspec.msgpack.decode(payload)):
        yield n


class Endless:
    """A handler that always has an item ready and says what became of it."""

    def __init__(self) -> None:
        self.produced = 0
        self.running = 0
        self.ended = anyio.Event()

    async def __call__(self, method, payload):
        self.running += 1
        try:
            while True:
                self.produced += 1
                yield self.produced
        finally:
            await anyio.lowlevel.checkpoint()  # clean-up that awaits
            self.running -= 1
            self.ended.set()


class Silent:
    """A handler that waits for ever, and whose clean-up waits for the test's permission."""

    def __init__(self) -> None:
        self.started = anyio.Event()
        self.cleaning = anyio.Event()
        self.may_end = anyio.Event()
        self.ended = anyio.Event()

    async def __call__(self, method, payload):
        try:
            self.started.set()
            await anyio.sleep_forever()
            yield
        finally:
            with anyio.CancelScope(shield=True):
                self.cleaning.set()
                await self.may_end.wait()
                self.ended.set()


async def test_items_arrive_complete_and_in_order(link):
    connection = await link(count_to)
    assert [n async for n in connection.open("count", 5000, item_type=int)] == list(range(5000))


async def test_an_empty_stream_ends_at_once(link):
    connection = await link(count_to)
    assert [n async for n in connection.open("count", 0)] == []


async def test_items_are_decoded_into_the_declared_type(link):
    async def handler(method, payload):
        yield Point(1, 2)

    connection = await link(handler)
    assert [p async for p in connection.open("points", item_type=Point)] == [Point(1, 2)]
    assert [p async for p in connection.open("points")] == [{"x": 1, "y": 2}]


async def test_an_item_of_another_type_is_refused_and_cancels_the_stream(link):
    endless = Endless()
    connection = await link(endless)
    stream = connection.open("numbers", item_type=Point)
    with pytest.raises(PayloadError, match="declared type"):
        await anext(stream)
    await stream.aclose()
    assert endless.running == 0


class Picky(msgspec.Struct):
    number: int

    def __post_init__(self):
        if self.number == 2:
            raise KeyError("not two")


async def test_an_item_that_its_own_type_refuses_comes_after_those_before_it(link):
    async def handler(method, payload):
        for number in range(4):
            yield {"number": number}

    stream = (await link(handler)).open("count", item_type=Picky)
    assert [(await anext(stream)).number for _ in range(2)] == [0, 1]
    with pytest.raises(PayloadError, match="not two"):
        await anext(stream)


async def test_call_returns_the_one_item(link):
    async def add(method, payload):
        yield sum(msgspec.msgpack.decode(payload, type=list[int]))

    connection = await link(add)
    assert await connection.call("add", [1, 2, 3], result_type=int) == 6


@pytest.mark.parametrize(("count", "said"), [(0, "no item"), (2, "more than one")])
async def test_call_wants_exactly_one_item(link, count, said):
    connection = await link(count_to)
    with pytest.raises(PayloadError, match=said):
        await connection.call("count", count)


async def test_a_payload_that_cannot_be_encoded_is_refused_at_open(link):
    connection = await link(count_to)
    with pytest.raises(PayloadError, match="payload of 'count' of type object can't be sent"):
        connection.open("count", object())
    assert await connection.call("count", 1) == 0


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"a": 1, "rows": [1, Point(1, range(3))]}, "['rows'][1].y"),
        ([[2**70]], "[0][0]"),
        ({"text": ("fine", "\ud800")}, "['text'][1]"),
        ({"there": {2j}}, "['there']"),
    ],
)
async def test_the_part_of_a_payload_that_cannot_be_encoded_is_named(link, payload, where):
    connection = await link(count_to)
    with pytest.raises(PayloadError, match=re.escape(f", at {where}, can't be sent")):
        connection.open("count", payload)


async def test_a_payload_that_holds_itself_is_refused(link):
    payload = []
    payload.append(payload)
    with pytest.raises(PayloadError, match="can't be sent"):
        (await link(count_to)).open("count", payload)


async def test_an_item_that_cannot_be_encoded_fails_the_stream_naming_the_type(link):
    async def handler(method, payload):
        yield 1
        yield Endless()

    connection = await link(handler)
    stream = connection.open("objects")
    assert await anext(stream) == 1
    with pytest.raises(PayloadError, match="item of 'objects' of type Endless"):
        await anext(stream)


async def test_a_payload_too_large_for_the_peer_is_refused_with_the_numbers(link):
    connection = await link(count_to, limits=Limits(message_bytes=2**21))
    with pytest.raises(PayloadError, match=r"has 3000005 bytes, the peer takes 2097152"):
        connection.open("count", b"x" * 3_000_000)


async def test_a_payload_of_just_the_limit_passes(link):
    async def length(method, payload):
        yield len(payload)

    connection = await link(length, limits=Limits(message_bytes=2**20))
    assert await connection.call("m" * 512, b"x" * (2**20 - 5)) == 2**20


async def test_a_large_item_passes_alone(link):
    async def handler(method, payload):
        yield 1
        yield b"x" * 9_000_000
        yield 2

    connection = await link(handler)
    assert [n if isinstance(n, int) else len(n) async for n in connection.open("large")] == [1, 9_000_000, 2]


async def test_an_item_type_that_msgspec_cannot_decode_is_refused_at_open(link):
    connection = await link(count_to)
    with pytest.raises(PayloadError, match="Type unions may not contain"):
        connection.open("count", 1, item_type=Point | dict)


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"message_bytes": 1000}, {"handshake_timeout": -1}])
def test_limits_out_of_range_are_refused(wrong):
    with pytest.raises(MisuseError, match=next(iter(wrong))):
        Limits(**wrong)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"method": ""}])
async def test_open_refuses_what_the_protocol_cannot_say(link, wrong):
    connection = await link(count_to)
    with pytest.raises(MisuseError, match="window"):
        connection.open(**{"method": "count"} | wrong)


# Credit.


async def test_a_slow_consumer_bounds_what_the_handler_produces(link):
    endless = Endless()
    connection = await link(endless)
    async with aclosing(connection.open("numbers", window=10)) as stream:
        for expected in range(1, 51):
            assert await anext(stream) == expected
            await wait_all_tasks_blocked()
            # the window, and the item that waits for credit at its yield
            assert endless.produced <= expected + 10 + 1


async def test_unread_bytes_are_bounded_too(link):
    produced = 0

    async def handler(method, payload):
        nonlocal produced
        while True:
            produced += 1
            yield b"x" * 100_000

    connection = await link(handler, limits=Limits(window_bytes=250_000))
    async with aclosing(connection.open("bytes")) as stream:
        await anext(stream)
        await wait_all_tasks_blocked()
        assert produced <= 5


async def test_a_stream_without_credit_does_not_hold_up_the_others(link):
    connection = await link(count_to)
    async with aclosing(connection.open("count", 1000, window=1)) as stuck:
        assert [n async for n in connection.open("count", 1000)] == list(range(1000))
        assert [n async for n in stuck] == list(range(1000))


async def test_neither_a_fast_handler_nor_its_consumer_starves_the_loop(link):
    connection = await link(Endless())
    turns = 0

    async def count_turns():
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async with anyio.create_task_group() as tasks, aclosing(connection.open("numbers", window=10_000)) as stream:
        tasks.start_soon(count_turns)
        for _ in range(6400):
            await anext(stream)
        assert turns >= 6400 // CHECKPOINT_ITEMS
        tasks.cancel_scope.cancel()


async def test_many_streams_at_once(link):
    connection = await link(count_to)
    got = {}

    async def consume(n):
        got[n] = [item async for item in connection.open("count", n, window=1 + n % 7)]

    async with anyio.create_task_group() as tasks:
        for n in range(200):
            tasks.start_soon(consume, n)
    assert got == {n: list(range(n)) for n in range(200)}


async def test_streams_beyond_the_limit_are_refused_until_a_handler_has_cleaned_up(link):
    silent = Silent()
    connection = await link(silent, limits=Limits(streams=2))
    streams = [connection.open("wait") for _ in range(2)]
    with pytest.raises(StreamRefused, match="serves 2 streams at once"):
        connection.open("wait")
    await silent.started.wait()
    await wait_all_tasks_blocked()
    streams[0].cancel()
    await silent.cleaning.wait()
    with pytest.raises(StreamRefused):
        connection.open("wait")
    silent.may_end.set()
    await streams[0].aclose()
    connection.open("wait").cancel()


async def test_slots_are_given_back(link):
    connection = await link(count_to, limits=Limits(streams=3))
    for _ in range(20):
        assert await connection.call("count", 1) == 0


# Cancel.


async def test_aclose_returns_when_the_waiting_handler_has_cleaned_up(link):
    silent = Silent()
    connection = await link(silent)
    stream = connection.open("wait")
    await silent.started.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.aclose)
        await silent.cleaning.wait()
        await wait_all_tasks_blocked()
        assert not silent.ended.is_set()
        silent.may_end.set()
    assert silent.ended.is_set()


async def test_aclose_closes_a_handler_that_waits_for_credit(link):
    endless = Endless()
    connection = await link(endless)
    stream = connection.open("numbers", window=3)
    assert await anext(stream) == 1
    await wait_all_tasks_blocked()
    await stream.aclose()
    assert endless.running == 0


async def test_a_generator_is_closed_in_the_task_that_drove_it(link):
    tasks = []

    async def handler(method, payload):
        tasks.append(anyio.get_current_task().id)
        try:
            while True:
                yield 1
        finally:
            tasks.append(anyio.get_current_task().id)

    connection = await link(handler)
    async with aclosing(connection.open("numbers")) as stream:
        await anext(stream)
    assert len(tasks) == 2
    assert tasks[0] == tasks[1]


async def test_a_handler_that_ignores_its_cancellation_is_closed_at_its_next_item(link):
    ended = False

    async def stubborn(method, payload):
        nonlocal ended
        try:
            while True:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                yield 1
        finally:
            ended = True

    connection = await link(stubborn)
    async with aclosing(connection.open("numbers")) as stream:
        await anext(stream)
    assert ended


async def test_a_closed_stream_is_at_its_end(link):
    connection = await link(Endless())
    stream = connection.open("numbers")
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert [item async for item in stream] == []


async def test_closing_wakes_a_consumer_that_waits(link):
    silent = Silent()
    silent.may_end.set()
    connection = await link(silent)
    stream = connection.open("wait")
    items = None

    async def consume():
        nonlocal items
        items = [item async for item in stream]

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)
        await silent.started.wait()
        await wait_all_tasks_blocked()
        await stream.aclose()
    assert items == []


async def test_a_stream_cancelled_before_its_handler_began_never_runs_it(link):
    endless = Endless()
    connection = await link(endless)
    stream = connection.open("numbers")
    stream.cancel()
    await stream.aclose()
    assert endless.produced == 0


async def test_a_consumer_that_gives_up_waiting_again_and_again_leaves_nothing_behind(link):
    async def quiet(method, payload):
        await anyio.sleep_forever()
        yield

    connection = await link(quiet)
    stream = connection.open("quiet")
    for _ in range(100):
        with anyio.move_on_after(0.001):
            await anext(stream)
    assert not any(connection._waiters.values())


async def test_cancelling_a_waiting_consumer_loses_no_item(link):
    send, receive = anyio.create_memory_object_stream[int](100)

    async def handler(method, payload):
        async for n in receive:
            yield n

    connection = await link(handler)
    stream = connection.open("numbers")
    got = []
    for n in range(20):
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def consume():
                    got.append(await anext(stream))

                tasks.start_soon(consume)
                await wait_all_tasks_blocked()
                send.send_nowait(n)
                if n % 3:
                    await wait_all_tasks_blocked()
                scope.cancel()
    send.close()
    got += [n async for n in stream]
    receive.close()
    assert got == list(range(20))


@pytest.mark.parametrize("thread", [False, True])
async def test_a_dropped_stream_is_cancelled(link, thread):
    silent = Silent()
    silent.may_end.set()
    connection = await link(silent)
    holder = [connection.open("wait")]
    await silent.started.wait()
    if thread:
        dropper = threading.Thread(target=lambda: (holder.clear(), gc.collect()))
        dropper.start()
        dropper.join()
    else:
        holder.clear()
        gc.collect()
    await silent.ended.wait()


async def test_cancelling_a_call_cancels_its_handler(link):
    silent = Silent()
    silent.may_end.set()
    connection = await link(silent)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.call, "wait")
        await silent.started.wait()
        tasks.cancel_scope.cancel()
    await silent.ended.wait()


# Large payloads.


async def test_a_large_payload_arrives_whole_both_ways(link):
    async def same(method, payload):
        yield payload
        yield "after it"
        yield payload

    connection = await link(same)
    value = bytes(range(256)) * 20_000
    assert [item async for item in connection.open("same", value)] == [value, "after it", value]


async def test_small_items_overtake_a_large_one_of_another_stream(link):
    """On a connection whose peer reads slowly, too: that is what parts are for."""

    async def handler(method, payload):
        if method == "large":
            yield b"x" * 30_000_000
            return
        while True:
            yield 1
            await anyio.lowlevel.checkpoint()

    connection = await link(handler)
    large = connection.open("large")
    small = connection.open("small")
    between = 0
    arrived = False

    async def wait_for_the_large_one():
        nonlocal arrived
        assert len(await anext(large)) == 30_000_000
        arrived = True

    async with aclosing(small), anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for_the_large_one)
        while not arrived:
            await anext(small)
            between += 1
    assert between > 5


async def test_large_items_of_several_streams_take_turns(link):
    async def handler(method, payload):
        yield b"x" * 5_000_000

    connection = await link(handler)
    streams = [connection.open("large") for _ in range(4)]
    order = []

    async def consume(n, stream):
        order.extend([(n, len(item)) async for item in stream])

    async with anyio.create_task_group() as tasks:
        for n, stream in enumerate(streams):
            tasks.start_soon(consume, n, stream)
    assert sorted(order) == [(n, 5_000_000) for n in range(4)]


async def test_cancelling_within_a_large_item_stops_it_and_leaves_the_connection(link):
    ended = 0

    async def handler(method, payload):
        nonlocal ended
        if method == "small":
            yield 1
            return
        try:
            while True:
                yield b"x" * 60_000_000
        finally:
            ended += 1

    connection = await link(handler)
    for _ in range(3):
        stream = connection.open("large")
        assert await connection.call("small") == 1  # so its first parts are under way
        await stream.aclose()
    assert ended == 3
    assert await connection.call("small") == 1
    assert not connection.session.talkative


async def test_cancelling_within_a_large_request_never_runs_its_handler(link):
    ran = []

    async def handler(method, payload):
        ran.append(method)
        yield 1

    connection = await link(handler)
    stream = connection.open("large", b"x" * 60_000_000)
    assert await connection.call("small") == 1
    await stream.aclose()
    assert await connection.call("small") == 1
    assert ran == ["small", "small"]


async def test_a_handler_may_fail_after_a_large_item(link):
    async def handler(method, payload):
        yield b"x" * 3_000_000
        raise ValueError("after it")

    connection = await link(handler)
    stream = connection.open("large")
    assert len(await anext(stream)) == 3_000_000
    with pytest.raises(ValueError, match="after it"):
        await anext(stream)


async def test_a_connection_that_ends_within_a_large_payload_ends_its_streams(link):
    async def handler(method, payload):
        yield b"x" * 60_000_000

    connection = await link(handler)
    down = connection.open("down")
    up = connection.open("up", b"x" * 60_000_000)
    await anyio.lowlevel.checkpoint()
    await connection.aclose()
    for stream in (down, up):
        with pytest.raises(ChannelLost):
            await anext(stream)


async def test_too_much_structure_is_refused_where_it_is_sent(link):
    connection = await link(count_to)
    with pytest.raises(PayloadError, match="more than 4194304 bytes besides its strings"):
        connection.open("count", [{}] * 5_000_000)
    assert await connection.call("count", 1) == 0
