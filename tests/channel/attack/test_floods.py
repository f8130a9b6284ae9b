"""Peers that know the token and keep the other side busy. Counts only: how long things take is for `make soak`."""

from __future__ import annotations

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint

from arun.channel import Limits
from arun.channel.codec import FRAME_BYTES, FRAME_MESSAGES, encode_message
from arun.channel.limits import Budget
from arun.channel.messages import Cancel, Credit, End, Fail, Item, ItemPart, LargeItem, Open, OpenPart, Ping, Pong
from tests.channel.attack.peers import NIL, RawPeer, frame, resident, site

pytestmark = pytest.mark.anyio


class Counting:
    """A handler whose methods run until they are cancelled, save "answer"; counts them, clean-up included."""

    def __init__(self) -> None:
        self.running = self.most = self.started = 0
        self.cleaning_up = 0
        self.may_clean_up = anyio.Event()
        self.may_clean_up.set()

    async def __call__(self, method, payload):
        if method == "answer":
            yield payload
            return
        self.running += 1
        self.started += 1
        self.most = max(self.most, self.running)
        try:
            yield 0
            await anyio.sleep_forever()
        finally:
            self.cleaning_up += 1
            with anyio.CancelScope(shield=True):
                await self.may_clean_up.wait()
                await checkpoint()
            self.running -= 1


async def reset(peer: RawPeer, numbers: range) -> None:
    """Open these streams, and cancel each when its handler runs. Returns when all have cleaned up."""
    await peer.stream.send(frame(*(Open(n, "run", 1, 1, NIL) for n in numbers)))
    await _count(peer, Item, len(numbers))
    await peer.stream.send(frame(*map(Cancel, numbers)))
    await _count(peer, End | Fail, len(numbers))


async def _count(peer: RawPeer, kind, number: int) -> None:
    while number > 0:
        number -= sum(isinstance(message, kind) for message in await peer.receive())


# Rapid reset.


async def test_rapid_reset_is_slowed_to_its_budget_and_leaves_others_alone(runtime):
    handler = Counting()
    limits = Limits(streams=100, disturbances=500)
    async with site(handler, limits=limits) as here:
        peer = await RawPeer.connect(here.server.address)
        began = anyio.current_time()
        resets = 0
        before = resident()
        async with anyio.create_task_group() as attack:

            async def rapidly():
                nonlocal resets
                while True:
                    await reset(peer, range(resets + 1, resets + 51))
                    resets += 50

            attack.start_soon(rapidly)
            answers = 0
            while resets < 600:
                assert await here.client.call("answer", answers) == answers
                answers += 1
            taken = anyio.current_time() - began
            attack.cancel_scope.cancel()
        assert handler.most <= limits.streams
        assert handler.started <= limits.streams + 50 + limits.disturbances * taken + 50
        assert answers > resets / 50, (
            "the honest client, one call at a time, has its turn between the attacker's frames"
        )
        assert resident() - before < 20 * 2**20
        await anyio.aclose_forcefully(peer.stream)
        while here.server.connections > 1:
            await checkpoint()
        assert handler.running == 0


async def test_what_is_cancelled_before_it_begins_never_runs(runtime):
    handler = Counting()
    async with site(handler, limits=Limits(disturbances=2**31 - 1)) as here:
        peer = await RawPeer.connect(here.server.address)
        for n in range(1, 5_000, 50):
            pairs = [message for m in range(n, n + 50) for message in (Open(m, "run", 1, 1, NIL), Cancel(m))]
            await peer.stream.send(frame(*pairs))
            await _count(peer, End | Fail, 50)
        assert handler.started == 0
        assert await here.client.call("answer", 1) == 1
        await peer.stream.aclose()


async def test_a_cancelled_stream_keeps_its_slot_until_its_handler_has_cleaned_up(runtime):
    handler = Counting()
    handler.may_clean_up = anyio.Event()
    limits = Limits(streams=20)
    async with site(handler, limits=limits) as here:
        peer = await RawPeer.connect(here.server.address)
        await peer.stream.send(frame(*(Open(n, "run", 1, 1, NIL) for n in range(1, 21))))
        await _count(peer, Item, 20)
        await peer.stream.send(frame(*map(Cancel, range(1, 21)), Open(21, "run", 1, 1, NIL)))
        while handler.cleaning_up < 20:
            await checkpoint()
        assert (handler.running, handler.started) == (20, 20)
        handler.may_clean_up.set()
        assert "beyond the 20 streams" in (await peer.goodbye()).reason
        assert handler.running == 0
        assert await here.client.call("answer", 1) == 1
        await peer.stream.aclose()


def test_a_budget_refills_with_time_and_not_beyond_its_burst():
    budget = Budget(10, 5, 100.0)
    assert budget.spend(5, 100.0) == 0
    assert budget.spend(1, 100.0) == pytest.approx(0.1)
    assert budget.spend(9, 100.0) == pytest.approx(1.0)
    assert budget.spend(0, 101.0) == 0
    assert budget.spend(5, 1000.0) == 0
    assert budget.spend(20, 1000.0) == pytest.approx(2.0)


# Floods.


async def test_a_flood_of_pings_is_answered_by_few_pongs(runtime):
    async with site(Counting(), limits=Limits(disturbances=2**31 - 1)) as here:
        peer = await RawPeer.connect(here.server.address)
        for round_ in range(20):
            last = (round_ + 1) * 1000
            await peer.stream.send(b"".join(frame(Ping(n)) for n in range(last - 999, last + 1)))
            pongs = 0
            while True:
                messages = await peer.receive()
                pongs += len(messages)
                if messages[-1] == Pong(last):
                    break
            assert pongs < 100
        await peer.stream.aclose()


async def test_pings_count_against_the_budget(runtime):
    async with site(Counting(), limits=Limits(streams=10, disturbances=100)) as here:
        peer = await RawPeer.connect(here.server.address)
        began = anyio.current_time()
        for n in range(1, 61):
            await peer.stream.send(frame(Ping(n)))
            assert (await peer.receive())[-1] == Pong(n)
        assert 10 + 100 * (anyio.current_time() - began) >= 58
        await peer.stream.aclose()


async def test_items_that_nobody_takes_do_not_pile_up_at_the_sender(runtime):
    """Slow readers: they grant credit for everything and read nothing."""
    limits = Limits(send_buffer=2**16)
    produced = 0

    async def pour(method, payload):
        nonlocal produced
        while True:
            produced += 1
            yield b"x" * 1000

    async with site(pour, limits=limits) as here:
        peers = [await RawPeer.connect(here.server.address) for _ in range(20)]
        before, grown = resident(), []
        for round_ in range(3):
            for peer in peers:
                numbers = range(round_ * 10 + 1, round_ * 10 + 11)
                await peer.stream.send(frame(*(Open(n, "pour", 2**31 - 1, 2**31 - 1, NIL) for n in numbers)))
            await anyio.wait_all_tasks_blocked()
            grown.append(resident() - before)
        made = produced
        await anyio.wait_all_tasks_blocked()
        assert produced == made, "all of them wait"
        # A send buffer, what the kernel holds and one item a stream; 600 streams would have gigabytes of credit.
        assert grown[-1] < 60 * 2**20
        stream = here.client.open("pour")
        for _ in range(1000):
            assert len(await anext(stream)) == 1000
        await stream.aclose()
        for peer in peers:
            await anyio.aclose_forcefully(peer.stream)


# Bombs. Each ends its own connection, with a goodbye that says why, and nothing else.

OPENED = (Open(1, "run", 2, 100, NIL),)
DEEP = msgspec.Raw(b"\x91" * 200_000 + b"\xc0")


def claims(count: int, length: int = 40) -> bytes:
    """A frame whose array says that it has so many elements."""
    body = b"\xdd" + count.to_bytes(4, "big")
    return (len(body) + length).to_bytes(4, "big") + body + bytes(length)


def cancels(count: int) -> bytes:
    """A frame of so many messages that cost work."""
    body = b"\xdd" + count.to_bytes(4, "big") + encode_message(Cancel(1)) * count
    return len(body).to_bytes(4, "big") + body


def in_parts(payload: bytes, size: int = 2**19) -> bytes:
    """A large payload of a request, as it should be sent."""
    parts = [payload[at : at + size] for at in range(0, len(payload), size)]
    return b"".join(
        frame(message)
        for message in (Open(1, "run", 1, 1, NIL, len(payload)), *(OpenPart(1, memoryview(part)) for part in parts))
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        pytest.param(claims(2**32 - 1), "1 to 4096 are legal", id="an array of 4 billion messages"),
        pytest.param(b"\xff\xff\xff\xff" + bytes(100), "bytes; 2 to", id="a frame of 4 GiB"),
        pytest.param(b"\0\0\0\0", "frame of 0 bytes", id="an empty frame"),
        pytest.param(b"\0\0\0\x01\x90", "frame of 1 bytes", id="a frame of no messages"),
        pytest.param(b"\0\0\0\x03\xdc\0\0", "frame of 0 messages", id="a longer frame of no messages"),
        pytest.param(cancels(10**6), "a frame of 3000005 bytes; 2 to 1048581", id="a million Cancels"),
        pytest.param(
            cancels(300_000), "frame of 300000 messages; 1 to 4096", id="as many Cancels as a frame has bytes"
        ),
        pytest.param(frame([5, 1, DEEP]), "is not valid", id="nested 200,000 deep"),
        pytest.param(frame(*OPENED, [6, 1, -1, 1]), "Expected `int` >= 1", id="negative credit"),
        pytest.param(frame(*OPENED, [6, 1, 1, 0]), "Expected `int` >= 1", id="credit of no bytes"),
        pytest.param(frame(*OPENED, [6, 1, 2**64 - 1, 1]), "Expected `int` <=", id="credit of 64 bits"),
        pytest.param(
            frame(*OPENED, Credit(1, 1, 1)), "more credit on 'run' than its window", id="more than the window"
        ),
        pytest.param(frame(Open(1, "run", 1, 1, NIL, 2**27)), "134217728 bytes for 'run'; 67108864", id="too large"),
        pytest.param(
            frame(Open(1, "run", 1, 1, NIL, 5), OpenPart(1, memoryview(b"123456"))),
            "does not fit",
            id="a part too long",
        ),
        pytest.param(frame(Open(1, "run", 1, 1, NIL, 5), OpenPart(1, memoryview(b""))), "not fit", id="an empty part"),
        pytest.param(frame(*OPENED, OpenPart(1, memoryview(b"1"))), "than it announced", id="a part for nothing"),
        pytest.param(frame(OpenPart(1, memoryview(b"1"))), "which is idle", id="a part of nothing"),
        pytest.param(frame(ItemPart(1, memoryview(b"1"))), "which is idle", id="a part of an item of nothing"),
        pytest.param(frame(LargeItem(1, 1)), "which is idle", id="a large item for nothing"),
        pytest.param(
            in_parts(b"\xdd" + (5 * 2**20).to_bytes(4, "big") + b"\x80" * (5 * 2**20)),
            "4194304 bytes besides",
            id="5 MiB of empty maps",
        ),
        pytest.param(
            in_parts(b"\xdd" + (2**21).to_bytes(4, "big") + b"\xa2xy" * 2**21),
            "4194304 bytes besides",
            id="2 million texts",
        ),
        pytest.param(
            in_parts(b"\xdd" + (2**21).to_bytes(4, "big") + b"\xc4\0" * 2**21),
            "4194304 bytes besides",
            id="no bytes, 2 million times",
        ),
        pytest.param(frame(Open(1, "run", 1, 1, NIL, 0, "0" * 56)), "is not valid", id="a trace that is too long"),
        pytest.param(frame([9, 1, 1]), "Expected `array` of", id="a surplus element"),
        pytest.param(frame([9]), "Expected `array` of", id="an element missing"),
        pytest.param(frame([99, 1]), "Invalid value 99", id="an unknown kind"),
        pytest.param(frame([True, 1]), "Expected `int`", id="a kind that is no number"),
        pytest.param(frame(Credit(7, 1, 1)), "stream 7, which is idle", id="credit for nothing"),
        pytest.param(frame(Cancel(2**63 - 1)), "which is idle", id="a cancel for nothing"),
        pytest.param(frame(Item(1, NIL)), "which is idle", id="an item for nothing"),
        pytest.param(frame(End(1)), "which is idle", id="an end for nothing"),
        pytest.param(frame(*OPENED, *OPENED), "which is closed", id="the same stream twice"),
        pytest.param(frame(*OPENED, Cancel(1), Cancel(1)), "which is cancelling", id="two cancels"),
        pytest.param(frame(Pong(1)), "never sent", id="a pong for nothing"),
        pytest.param(frame([4, 1, b"run", 1, 1, None]), "Expected `str`", id="a method of bytes"),
        pytest.param(b"\0\0\0\x0b\x91\x96\x04\x01\xa2\xff\xfe\x01\x01\xc0\xc0", "is not valid", id="bad UTF-8"),
    ],
)
async def test_a_bomb_ends_its_connection_and_nothing_else(runtime, said, reason):
    handler = Counting()
    async with site(handler) as here:
        before = resident()
        peer = await RawPeer.connect(here.server.address)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_send, peer, said)
            goodbye = await peer.goodbye()
            assert "protocol error: 127.0.0.1" in goodbye.reason
            assert reason in goodbye.reason
        await peer.stream.aclose()
        while here.server.connections > 1:
            await checkpoint()
        assert handler.running == 0
        assert resident() - before < 20 * 2**20
        assert await here.client.call("answer", "still here") == "still here"


async def _send(peer: RawPeer, said: bytes) -> None:
    try:
        await peer.stream.send(said)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        pass  # it was cut off before it had said all


async def test_a_frame_of_the_largest_legal_count_is_taken(runtime):
    assert FRAME_MESSAGES * 3 < FRAME_BYTES
    handler = Counting()
    async with site(handler, limits=Limits(disturbances=2**31 - 1)) as here:
        peer = await RawPeer.connect(here.server.address)
        await peer.stream.send(frame(*OPENED, Cancel(1)))
        await _count(peer, End, 1)
        await peer.stream.send(frame(*[Cancel(1)] * FRAME_MESSAGES))  # late, all of them
        await peer.stream.send(frame(Ping(1)))
        await _count(peer, Pong, 1)
        await peer.stream.aclose()
