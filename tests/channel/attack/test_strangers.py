"""Peers without the token: they learn nothing, and nothing is left of them."""

from __future__ import annotations

import asyncio
import os

import anyio
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from structlog.testing import capture_logs

from arun.channel import Limits, connect_tcp, serve_tcp
from arun.channel.codec import FrameReader
from arun.channel.handshake import Secret
from arun.channel.messages import Cancel, Challenge, Hello, Open, Ping
from tests.channel.attack.peers import NIL, TOKEN, frame, open_files, resident

pytestmark = pytest.mark.anyio

STRANGERS = 10_000
AT_ONCE = 32  # below the cap on half-open connections
CHALLENGE_BYTES = len(frame(Challenge(bytes(32))))

WRONG = [
    None,  # and waits
    b"",  # and gone
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # a TLS hello
    b"\x80\x04\x95" + bytes(100),  # a pickle
    b"\xff\xff\xff\xff",
    frame(Hello(1, 1, bytes(32), bytes(32), 2**31 - 1, 2**31 - 1)),
    frame(Open(1, "run", 1, 1, NIL)),
    frame(Ping(1), Cancel(1)),
    b"\0\0\x0f\xff\x91" + b"\x91" * 4094,
    frame(msgspec.Raw(b"\xc6\xff\xff\xff\xff")),
]


async def nobody(method, payload):
    raise AssertionError("a stranger was served")
    yield


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.timeout(120)
async def test_ten_thousand_wrong_and_silent_peers_learn_nothing_and_leave_nothing(runtime):
    server = await serve_tcp(nobody, token=TOKEN, limits=Limits(handshake_timeout=0.05))
    host, port = server.address
    told = 0

    async def stranger(number: int) -> None:
        nonlocal told
        reader, writer = await asyncio.open_connection(host, port)
        try:
            said = WRONG[number % len(WRONG)]
            if number % 3 == 0:  # answers the challenge, with a token of its own
                challenge = await reader.readexactly(CHALLENGE_BYTES)
                told += len(challenge)
                said = guess(challenge)
            if said is not None:
                writer.write(said)
            if said == b"":
                return
            told += len(await reader.read())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # cut off with its words unread; or at once, where too many are half open on a slow machine
        finally:
            writer.transport.abort()

    async def strangers(numbers: range) -> None:
        for number in numbers:
            await stranger(number)

    await strangers(range(100))  # what is made once
    while server._half_open:
        await checkpoint()
    told = 0
    files, works, memory = open_files(), len(runtime._works), resident()
    with capture_logs() as logs:
        async with asyncio.TaskGroup() as tasks:
            for n in range(AT_ONCE):
                tasks.create_task(strangers(range(n, STRANGERS, AT_ONCE)))
    while server._half_open or open_files() > files:
        await checkpoint()
    assert server.connections == 0
    # A challenge each, at the most: no version, no reason, no goodbye.
    assert told <= STRANGERS * CHALLENGE_BYTES
    assert len(runtime._works) == works
    assert resident() - memory < 2 * 2**20
    # Nor can they fill the disk: most are only counted.
    assert len(logs) < 200
    assert sum(1 + entry["unlogged"] for entry in logs) > STRANGERS / 2
    await server.aclose()


def guess(challenge: bytes) -> bytes:
    reader: FrameReader[Challenge] = FrameReader("server", Challenge, 4096)
    reader.feed(challenge)
    messages = reader.next_frame()
    assert messages is not None
    nonce = os.urandom(32)
    proof = Secret(b"a guess").proof("client", messages[0].nonce, nonce)
    return frame(Hello(1, 1, nonce, proof, 100, 2**20))


async def test_silent_peers_are_capped_and_dropped_and_do_not_keep_others_out_for_long(runtime):
    limits = Limits(half_open=16, handshake_timeout=0.2)
    server = await serve_tcp(nobody, token=TOKEN, limits=limits)
    files = open_files()
    told = dropped = 0

    async def silent() -> None:
        nonlocal told, dropped
        async with await anyio.connect_tcp(*server.address) as stream:
            try:
                while True:
                    told += len(await stream.receive())
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                dropped += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(200):
            tasks.start_soon(silent)
        while dropped < 150:
            assert server._half_open <= limits.half_open
            await checkpoint()
    # Who was beyond the cap was told nothing at all.
    assert 0 < told <= 200 * CHALLENGE_BYTES
    assert dropped == 200
    while server._half_open or open_files() > files:
        await checkpoint()
    client = await connect_tcp(*server.address, token=TOKEN)
    await client.aclose()
    await server.aclose()


async def _dribble(stream, data: bytes) -> None:
    for n in range(len(data)):
        await stream.send(data[n : n + 1])
        await anyio.sleep(0.02)


async def test_a_peer_that_dribbles_is_dropped_at_the_deadline(runtime):
    """A byte now and then does not prolong the handshake."""
    server = await serve_tcp(nobody, token=TOKEN, limits=Limits(handshake_timeout=0.2))
    async with await anyio.connect_tcp(*server.address) as stream:
        hello = frame(Hello(1, 1, bytes(32), bytes(32), 1, 2**20))
        assert len(hello) * 0.02 > 1  # seconds that it would take
        with pytest.raises(anyio.BrokenResourceError):
            await _dribble(stream, hello[:-1])
    await server.aclose()
