"""Connections and servers: the end of a connection, authentication, addresses."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
from contextlib import aclosing

import anyio
import msgspec
import pytest
import trio
from anyio import wait_all_tasks_blocked
from structlog.testing import capture_logs

from arun.channel import Limits, connect_tcp, connect_unix, memory_pair, serve_tcp, serve_unix
from arun.channel.codec import FrameReader, encode_message
from arun.channel.handshake import Secret
from arun.channel.messages import NEWEST_VERSION, Challenge, Goodbye, Hello, Item, Open, SessionMessage, Welcome
from arun.channel.outbox import Outbox
from arun.errors import ChannelLost, MisuseError, PortInUse, ProtocolError
from arun.runtime import Runtime

from .conftest import TOKEN

pytestmark = pytest.mark.anyio


async def echo(method, payload):
    yield payload


class Waiting:
    """A handler that yields one item, waits for ever, and tells when it has cleaned up."""

    def __init__(self) -> None:
        self.running = 0

    async def __call__(self, method, payload):
        self.running += 1
        try:
            yield "started"
            await anyio.sleep_forever()
        finally:
            self.running -= 1


def frame(*messages) -> bytes:
    outbox = Outbox()
    for message in messages:
        outbox.append(message if isinstance(message, bytes) else encode_message(message))
    return outbox.take_frame()


# The end of a connection.


async def test_aclose_fails_open_streams_and_awaits_the_clean_up_at_both_sides(link):
    waiting = Waiting()
    connection = await link(waiting)
    stream = connection.open("wait")
    assert await anext(stream) == "started"
    await connection.aclose()
    assert waiting.running == 0
    with pytest.raises(ChannelLost, match="this side closed the connection"):
        await anext(stream)
    await stream.aclose()


async def test_a_closed_connection_refuses_to_open(link):
    connection = await link(echo)
    assert not connection.closed
    await connection.aclose()
    await connection.aclose()
    await connection.wait_closed()
    assert connection.closed
    with pytest.raises(ChannelLost, match="closed"):
        connection.open("echo")


async def test_items_that_arrived_before_the_end_come_first(link):
    waiting = Waiting()
    connection = await link(waiting)
    stream = connection.open("wait")
    async with aclosing(connection.open("wait")) as other:
        await anext(other)  # so the first stream's item is here too
    await connection.aclose()
    assert await anext(stream) == "started"
    with pytest.raises(ChannelLost):
        await anext(stream)


async def test_closing_one_end_closes_the_other_with_its_reason(runtime):
    waiting = Waiting()
    a, b = memory_pair(handler_a=waiting)
    stream = b.open("wait")
    assert await anext(stream) == "started"
    await a.aclose()
    await b.wait_closed()
    assert waiting.running == 0
    with pytest.raises(ChannelLost, match="memory said goodbye"):
        await anext(stream)


async def test_both_ends_may_close_at_once(runtime):
    a, b = memory_pair(handler_a=echo, handler_b=echo)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.aclose)
        tasks.start_soon(b.aclose)


async def test_either_end_may_open_streams(runtime):
    a, b = memory_pair(handler_a=echo, handler_b=echo)
    assert await a.call("echo", 1) == 1
    assert await b.call("echo", 2) == 2
    await a.aclose()


async def test_an_end_without_a_handler_refuses_calls(runtime):
    a, b = memory_pair(handler_b=echo)
    with pytest.raises(MisuseError, match="no handler"):
        await b.call("echo")
    await a.aclose()


async def test_a_handler_may_close_its_own_connection(runtime):
    async def hang_up(method, payload):
        a.close_soon()
        await anyio.sleep_forever()
        yield

    a, b = memory_pair(handler_a=hang_up)
    with pytest.raises(ChannelLost, match="said goodbye"):
        await b.call("hang up")
    await a.wait_closed()


async def test_cancelling_aclose_does_not_stop_the_closing(runtime):
    may_end = anyio.Event()

    async def slow(method, payload):
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await may_end.wait()

    a, b = memory_pair(handler_a=slow)
    stream = b.open("slow")
    await anext(stream)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.aclose)
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert a.closed
    may_end.set()
    await a.wait_closed()
    await b.wait_closed()


async def test_a_peer_that_does_not_close_is_left_after_the_goodbye_timeout(runtime):
    stay = anyio.Event()

    async def slow(method, payload):
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await stay.wait()

    a, b = memory_pair(handler_a=slow, limits=Limits(goodbye_timeout=0.01))
    stream = b.open("slow")
    await anext(stream)
    await b.aclose()
    assert not stay.is_set()
    stay.set()
    await a.wait_closed()


# Raw peers, which speak the protocol by hand.


class RawPeer:
    """A client that speaks the protocol by hand."""

    def __init__(self, stream, peer="raw") -> None:
        self.stream = stream
        self.reader = FrameReader(peer, Challenge, 4096)

    async def receive(self, expected=None):
        if expected is not None:
            self.reader = self.reader.switch(expected, 2**20)
        while (messages := self.reader.next_frame()) is None:
            self.reader.feed(await self.stream.receive())
        return messages

    async def authenticate(self, token=TOKEN, **changes):
        [challenge] = await self.receive()
        nonce = bytes(32)
        hello = Hello(1, 1, nonce, Secret(token).proof("client", challenge.nonce, nonce), 100, 2**20)
        await self.stream.send(frame(msgspec.structs.replace(hello, **changes)))


async def test_a_peer_that_vanishes_fails_every_stream_and_cancels_its_handlers(runtime):
    waiting = Waiting()
    server = await serve_tcp(waiting, token=TOKEN)
    raw = RawPeer(await anyio.connect_tcp(*server.address))
    await raw.authenticate()
    await raw.receive(Welcome)
    await raw.stream.send(frame(Open(1, "wait", 10, 1000, msgspec.Raw(b"\xc0"))))
    [item] = await raw.receive(SessionMessage)
    assert isinstance(item, Item)
    assert (waiting.running, server.connections) == (1, 1)
    await anyio.aclose_forcefully(raw.stream)
    while server.connections:
        await anyio.lowlevel.checkpoint()
    assert waiting.running == 0
    await server.aclose()


async def _serve_raw(serve_one):
    """A TCP server whose one connection is served by hand."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")

    async def run():
        async with listener:
            await listener.serve(serve_one)

    return listener, run


async def test_a_server_that_vanishes_fails_streams_naming_peer_and_reason(runtime):
    async def vanish(stream):
        async with stream:
            nonce = bytes(32)
            await stream.send(frame(Challenge(nonce)))
            reader = FrameReader("client", Hello, 4096)
            while (messages := reader.next_frame()) is None:
                reader.feed(await stream.receive())
            proof = Secret(TOKEN).proof("server", nonce, messages[0].nonce)
            await stream.send(frame(Welcome(1, proof, 100, 2**20)))
            await stream.receive()

    listener, run = await _serve_raw(vanish)
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        connection = await connect_tcp("127.0.0.1", port, token=TOKEN)
        stream = connection.open("wait")
        with pytest.raises(ChannelLost, match=rf"127.0.0.1:{port} (closed|broke)|connection to 127.0.0.1:{port} broke"):
            await anext(stream)
        await connection.wait_closed()
        assert connection.closed
        tasks.cancel_scope.cancel()


async def test_a_protocol_error_ends_the_connection_and_tells_the_peer(runtime):
    waiting = Waiting()
    server = await serve_tcp(waiting, token=TOKEN)
    with capture_logs() as logs:
        async with await anyio.connect_tcp(*server.address) as stream:
            raw = RawPeer(stream)
            await raw.authenticate()
            await raw.receive(Welcome)
            await stream.send(frame(Item(7, msgspec.Raw(b"\xc0"))))
            [goodbye] = await raw.receive(SessionMessage)
            assert isinstance(goodbye, Goodbye)
            assert "sent Item for stream 7, which is idle" in goodbye.reason
    await server.aclose()
    assert "connection.protocol_broken" in [entry["event"] for entry in logs]


# Authentication.


async def test_a_wrong_token_is_told_nothing_and_logged_without_secrets(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    with capture_logs() as logs:
        with pytest.raises(ChannelLost, match="hung up during authentication: it has another token") as caught:
            await connect_tcp(*server.address, token=b"a guess")
        await wait_all_tasks_blocked()
    assert server.connections == 0
    [failure] = [entry for entry in logs if entry["event"] == "authentication.failed"]
    assert "has another token" in failure["error"]
    said = repr((logs, caught.value, server, Secret(TOKEN)))
    assert TOKEN.decode() not in said
    assert TOKEN.hex() not in said
    await server.aclose()


async def test_a_token_of_one_client_can_be_taken_back_without_touching_the_others(runtime):
    server, left = await serve_tcp(Waiting(), token=TOKEN), []
    server.admit(b"guest", on_left=lambda: left.append("guest"))
    owner, guest = [await connect_tcp(*server.address, token=token) for token in (TOKEN, b"guest")]
    streams = [connection.open("wait") for connection in (owner, guest)]
    assert [await anext(stream) for stream in streams] == ["started"] * 2
    server.revoke(b"guest")
    with pytest.raises(ChannelLost):
        await anext(streams[1])
    await guest.aclose()
    while server.connections > 1:
        await anyio.lowlevel.checkpoint()
    assert left == []  # nobody is to be told of what it did itself
    with pytest.raises(ChannelLost, match="another token"):
        await connect_tcp(*server.address, token=b"guest")
    assert not owner.closed
    await server.aclose()
    await owner.aclose()


async def test_a_server_tells_when_a_client_has_left(runtime):
    server, left = await serve_tcp(echo, token=TOKEN), anyio.Event()
    server.admit(b"guest", on_left=left.set)
    guest = await connect_tcp(*server.address, token=b"guest")
    assert [item async for item in guest.open("echo", 1)] == [1]
    assert server.in_use(b"guest")
    assert not server.in_use(b"another")
    await guest.aclose()
    with anyio.fail_after(5):
        await left.wait()
    assert not server.in_use(b"guest")
    await server.aclose()


async def test_nothing_follows_the_challenge_for_a_wrong_token(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        await raw.authenticate(token=b"a guess")
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    await server.aclose()


async def test_a_proof_cannot_be_reflected(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        [challenge] = await raw.receive()
        proof = Secret(TOKEN).proof("server", challenge.nonce, challenge.nonce)
        await stream.send(frame(Hello(1, 1, challenge.nonce, proof, 1, 1)))
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    await server.aclose()


async def test_the_server_must_know_the_token_too(runtime):
    async def impostor(stream):
        async with stream:
            await stream.send(frame(Challenge(bytes(32))))
            await stream.receive()
            await stream.send(frame(Welcome(1, bytes(32), 100, 2**20)))
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()

    listener, run = await _serve_raw(impostor)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with pytest.raises(ProtocolError, match="could not prove that it knows the token"):
            await connect_tcp("127.0.0.1", listener.extra(anyio.abc.SocketAttribute.local_port), token=TOKEN)
        tasks.cancel_scope.cancel()


async def test_another_version_is_refused_with_the_numbers(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        await raw.authenticate(oldest=2, newest=3)
        [goodbye] = await raw.receive(Welcome | Goodbye)
        assert "versions 1 to 1" in goodbye.reason
    await server.aclose()


async def test_the_newest_version_that_both_speak_is_spoken(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        await raw.authenticate(oldest=1, newest=7)
        [welcome] = await raw.receive(Welcome)
        assert welcome.version == NEWEST_VERSION
    await server.aclose()


async def test_a_silent_peer_is_dropped_at_the_deadline(runtime):
    server = await serve_tcp(echo, token=TOKEN, limits=Limits(handshake_timeout=0.02))
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        await raw.receive()
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    await server.aclose()


async def test_a_silent_server_is_given_up_at_the_deadline(runtime):
    async def silent(stream):
        async with stream:
            await anyio.sleep_forever()

    listener, run = await _serve_raw(silent)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        with pytest.raises(ChannelLost, match=r"did not answer within 0.02 s"):
            await connect_tcp("127.0.0.1", port, token=TOKEN, limits=Limits(handshake_timeout=0.02))
        tasks.cancel_scope.cancel()


async def test_half_open_connections_are_capped(runtime):
    server = await serve_tcp(echo, token=TOKEN, limits=Limits(half_open=2))
    silent = [RawPeer(await anyio.connect_tcp(*server.address)) for _ in range(2)]
    for raw in silent:
        await raw.receive()
    with pytest.raises(ChannelLost, match="too many clients"):
        await connect_tcp(*server.address, token=TOKEN)
    for raw in silent:
        await anyio.aclose_forcefully(raw.stream)
    await wait_all_tasks_blocked()
    await server.aclose()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (5000).to_bytes(4, "big") + bytes(5000),
        frame(Hello(1, 1, bytes(32), bytes(32), 1, 1), Hello(1, 1, bytes(32), bytes(32), 1, 1)),
        frame(Goodbye("")),
    ],
    ids=["http", "too long", "two messages", "another message"],
)
async def test_whoever_does_not_begin_with_hello_is_dropped(runtime, said):
    server = await serve_tcp(echo, token=TOKEN)
    async with await anyio.connect_tcp(*server.address) as stream:
        raw = RawPeer(stream)
        await raw.receive()
        await stream.send(said)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    await server.aclose()


# Servers and addresses.


async def test_server_aclose_says_goodbye_and_leaves_no_socket(runtime):
    waiting = Waiting()
    server = await serve_tcp(waiting, token=TOKEN)
    connections = [await connect_tcp(*server.address, token=TOKEN) for _ in range(3)]
    streams = [connection.open("wait") for connection in connections]
    for stream in streams:
        await anext(stream)
    assert (server.connections, waiting.running) == (3, 3)
    await server.aclose()
    await server.aclose()
    assert (server.connections, waiting.running) == (0, 0)
    for connection, stream in zip(connections, streams, strict=True):
        with pytest.raises(ChannelLost, match="said goodbye"):
            await anext(stream)
        await connection.wait_closed()
    with pytest.raises(ChannelLost, match="can't connect"):
        await connect_tcp(*server.address, token=TOKEN)


async def test_a_taken_port_is_refused_with_the_fix(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    host, port = server.address
    with pytest.raises(PortInUse, match=rf"port {port} of 127.0.0.1 is taken.*port=0"):
        await serve_tcp(echo, token=TOKEN, host=host, port=port)
    await server.aclose()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
async def test_wildcard_addresses_are_refused(runtime, host):
    with pytest.raises(MisuseError, match="every network"):
        await serve_tcp(echo, token=TOKEN, host=host)


@pytest.mark.parametrize(("token", "said"), [(b"", "empty token"), ("secret", "a token is bytes, not str")])
async def test_what_is_no_token_is_refused(runtime, token, said):
    with pytest.raises(MisuseError, match=said):
        await serve_tcp(echo, token=token)


async def test_tcp_connections_have_no_delay(runtime):
    server = await serve_tcp(echo, token=TOKEN)
    connection = await connect_tcp(*server.address, token=TOKEN)
    for wire in (connection._wire, *(other._wire for other in server._connections)):
        raw = wire.extra(anyio.abc.SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    await connection.aclose()
    await server.aclose()


async def test_both_ends_of_a_tcp_connection_notice_a_machine_that_is_gone(runtime):
    limits = Limits(silence=12)
    server = await serve_tcp(echo, token=TOKEN, limits=limits)
    connection = await connect_tcp(*server.address, token=TOKEN, limits=limits)
    for wire in (connection._wire, *(other._wire for other in server._connections)):
        raw = wire.extra(anyio.abc.SocketAttribute.raw_socket)
        assert raw.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, every, times, unanswered = (
            raw.getsockopt(socket.IPPROTO_TCP, option)
            for option in (
                socket.TCP_KEEPIDLE,
                socket.TCP_KEEPINTVL,
                socket.TCP_KEEPCNT,
                socket.TCP_USER_TIMEOUT,
            )
        )
        assert idle + every * times == 12
        assert unanswered == 12_000
    await connection.aclose()
    await server.aclose()


async def test_a_peer_that_takes_nothing_for_too_long_is_cut_off(runtime):
    async def pour(method, payload):
        while True:
            yield b"x" * 100_000

    server = await serve_tcp(pour, token=TOKEN, limits=Limits(silence=1))
    raw = RawPeer(await anyio.connect_tcp(*server.address))
    await raw.authenticate()
    await raw.receive(Welcome)
    await raw.stream.send(frame(Open(1, "pour", 2**31 - 1, 2**31 - 1, msgspec.Raw(b"\xc0"))))
    with capture_logs() as logs:
        while not server.connections:
            await anyio.lowlevel.checkpoint()
        [held] = server._connections
        await held.wait_closed()
    [closed] = [entry for entry in logs if entry["event"] == "connection.closed"]
    assert "TimeoutError" in closed["reason"]
    await anyio.aclose_forcefully(raw.stream)
    await server.aclose()


async def test_a_unix_socket_is_private_and_removed(runtime, tmp_path):
    path = tmp_path / "a.sock"
    server = await serve_unix(echo, path=path, token=TOKEN)
    assert server.address == str(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    connection = await connect_unix(path, token=TOKEN)
    assert connection.peer == f"unix:{path}"
    assert await connection.call("echo", 1) == 1
    await connection.aclose()
    await server.aclose()
    assert not path.exists()


async def test_a_unix_socket_in_use_is_refused_and_a_stale_one_replaced(runtime, tmp_path):
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(os.fspath(path))
    server = await serve_unix(echo, path=path, token=TOKEN)
    with pytest.raises(PortInUse, match="another process listens"):
        await serve_unix(echo, path=path, token=TOKEN)
    await server.aclose()
    path.write_text("a file")
    with pytest.raises(PortInUse, match="is no socket"):
        await serve_unix(echo, path=path, token=TOKEN)


async def test_a_unix_path_that_is_too_long_is_refused_with_the_numbers(runtime, tmp_path):
    with pytest.raises(MisuseError, match="107 bytes"):
        await serve_unix(echo, path=tmp_path / ("x" * 100), token=TOKEN)


# Coalescing, and the loop's or Runtime's end.


async def test_items_are_coalesced_into_frames(runtime):
    frames = []

    async def count(method, payload):
        for n in range(640):
            yield n

    a, b = memory_pair(handler_a=count)
    send = a._wire._stream.send

    async def counting(data):
        frames.append(data)
        await send(data)

    a._wire._stream.send = counting
    assert len([n async for n in b.open("count", window=1000)]) == 640
    assert len(frames) <= 640 // 32
    await a.aclose()


async def test_a_large_payload_goes_out_in_frames_of_256_kib(runtime):
    sizes = []

    async def large(method, payload):
        yield b"x" * 2_000_000

    a, b = memory_pair(handler_a=large)
    send = a._wire._stream.send

    async def counting(data):
        sizes.append(len(data))
        await send(data)

    a._wire._stream.send = counting
    assert len(await b.call("large")) == 2_000_000
    assert max(sizes) <= 2**18 + 32
    assert len(sizes) <= 2_000_000 / 2**18 + 3
    await a.aclose()


async def test_a_runtime_that_closes_ends_its_connections_and_handlers(anyio_backend):
    waiting = Waiting()
    async with Runtime():
        server = await serve_tcp(waiting, token=TOKEN)
        connection = await connect_tcp(*server.address, token=TOKEN)
        stream = connection.open("wait")
        assert await anext(stream) == "started"
    assert waiting.running == 0
    assert connection.closed
    with pytest.raises(ChannelLost):
        await anext(stream)
    with pytest.raises(OSError, match=r"fail|refused"):
        await anyio.connect_tcp(*server.address)


async def clean_up_slowly(method, payload):
    """As asyncio programs are written: the clean-up awaits, and nothing shields it."""
    try:
        yield "started"
        await asyncio.sleep(3600)
    finally:
        for _ in range(5):
            await asyncio.sleep(0)
        cleaned.append(method)


cleaned: list[str] = []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_on_asyncio_clean_up_may_await_without_a_shield(link):
    cleaned.clear()
    connection = await link(clean_up_slowly)
    stream = connection.open("closed")
    assert await anext(stream) == "started"
    await wait_all_tasks_blocked()
    await stream.aclose()
    other = connection.open("lost")
    assert await anext(other) == "started"
    await wait_all_tasks_blocked()
    await connection.aclose()
    assert cleaned == ["closed", "lost"]


def test_a_loop_that_ends_under_open_connections_leaves_nothing(tmp_path):
    cleaned.clear()

    async def main():
        server = await serve_unix(clean_up_slowly, path=tmp_path / "a.sock", token=TOKEN)
        connection = await connect_unix(server.address, token=TOKEN)
        stream = connection.open("left")
        assert await anext(stream) == "started"
        return stream

    stream = asyncio.run(main())
    assert cleaned == ["left"]
    assert not (tmp_path / "a.sock").exists()
    del stream
    gc.collect()


def test_without_a_runtime_trio_is_told_to_open_one():
    async def main():
        memory_pair()

    with pytest.raises(MisuseError, match="no Runtime is open"):
        trio.run(main)


# Other event loops.


@pytest.mark.parametrize("anyio_backend", [pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")])
async def test_uvloop_will_do_as_well(runtime, tmp_path):
    pytest.importorskip("uvloop")
    over_tcp = await serve_tcp(echo, token=TOKEN)
    over_unix = await serve_unix(echo, path=tmp_path / "socket", token=TOKEN)
    connections = [
        await connect_tcp(*over_tcp.address, token=TOKEN),
        await connect_unix(tmp_path / "socket", token=TOKEN),
    ]
    for connection in connections:
        assert [item async for item in connection.open("echo", list(range(1000)))] == [list(range(1000))]
        await connection.aclose()
    await over_tcp.aclose()
    await over_unix.aclose()
