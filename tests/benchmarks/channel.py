"""Actors and their channels beside Ray, which moves results through its object store, and beside bare sockets.

The floor is what asyncio and msgspec need for the same bytes between two processes: no credit, no cancellation, no
authentication, no types but the payload's. The peer is Ray: a streaming generator, a call of an async actor.

All of them run apart, the client on one core and what serves it on another, as they do on an idle machine. Where the
kernel puts two processes that take turns makes a factor of two in the time of a call, whoever makes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from actors import LocalCluster, RayCluster

from .harness import Check, Contestant, Options, Row, medians

__all__ = ("ROWS",)

_FRAME_ITEMS = 64


class Source:
    """The actor; Ray's peer is the same class."""

    async def items(self, count: int, size: int) -> AsyncIterator[bytes]:
        item = b"x" * size
        for _ in range(count):
            yield item

    async def same(self, number: int) -> int:
        return number

    async def pid(self) -> int:
        return os.getpid()

    async def wait(self) -> AsyncIterator[int]:
        await asyncio.Event().wait()
        yield 0


def items(options: Options) -> list[Row]:
    """Items of 100 bytes, from an actor in another process."""
    return _items(options, size=100, count=200_000, ray_times=100, floor=0.5)


def large_items(options: Options) -> list[Row]:
    """Items of 10 kB."""
    return _items(options, size=10_000, count=20_000, ray_times=20, floor=None)


def calls(options: Options) -> list[Row]:
    """Calls one after the other: the median of their times by the watch."""
    count = options.n(3000)
    with _ray():
        taken = medians(
            {
                "local": _on(LocalCluster, lambda actor: _calls(lambda: actor.same(1), count)),
                "ray cluster": _on(RayCluster.connect, lambda actor: _calls(lambda: actor.same(1), count)),
                "floor": _bare(socket.AF_INET, lambda reader, writer: _calls(lambda: _echo(reader, writer), count)),
                "unix floor": _bare(
                    socket.AF_UNIX, lambda reader, writer: _calls(lambda: _echo(reader, writer), count)
                ),
                "ray": lambda: _ray_calls(options.n(1000)),
            },
            options,
        )
    rows = []
    for name, floor in (("local", "unix floor"), ("ray cluster", "floor")):
        checks = [
            Check("Ray's at least 10 times as long", taken["ray"] / taken[name], 10, at_least=True),
            Check("< 3 x a bare socket's echo", taken[name] / taken[floor], 3),
        ]
        what = f"a call of an actor of {_CLUSTERS[name]} (peer: Ray)"
        rows.append(Row(what, "us", taken[name], taken[floor], taken["ray"], checks))
    return rows


def idle(options: Options) -> list[Row]:
    """10,000 streams on one connection on which nothing moves, in a process of their own."""
    count = options.n(10_000)
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.channel", str(count)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, busy, turns = map(float, done.stdout.split())
    return [
        Row(
            f"{count:,} idle streams, both ends", "MB", memory, None, None, [Check("< 100 MB", memory / 1e6, 100, "MB")]
        ),
        Row("their CPU", "", busy, None, None, [Check("no polling: < 0.1 % of a core", busy * 100, 0.1, "%")]),
        Row("turns of the event loop in 3 s", "", turns, None, None, [Check("no polling: at most 10", turns, 10, "")]),
    ]


ROWS = {"items": items, "large_items": large_items, "calls": calls, "idle_streams": idle}

_CLUSTERS = {"local": "LocalCluster", "ray cluster": "RayCluster"}


def _items(options: Options, *, size: int, count: int, ray_times: float, floor: float | None) -> list[Row]:
    many, few = options.n(count), options.n(2000)
    with _ray():
        taken = medians(
            {
                "local": _on(LocalCluster, lambda actor: _drain(actor.items(many, size), many)),
                "ray cluster": _on(RayCluster.connect, lambda actor: _drain(actor.items(many, size), many)),
                "floor": _bare(socket.AF_INET, lambda reader, writer: _bare_items(reader, writer, many, size)),
                "ray": lambda: _ray_items(few, size),
            },
            options,
        )
    rows = []
    for name, cluster in _CLUSTERS.items():
        checks = [
            Check(f"Ray's at least {ray_times:g} times as long", taken["ray"] / taken[name], ray_times, at_least=True)
        ]
        if floor is not None:
            target = f"at least {floor:g} of a bare loop's rate"
            checks.append(Check(target, taken["floor"] / taken[name], floor, at_least=True))
        what = f"an item of {size:,} bytes from an actor of {cluster} (peer: Ray)"
        rows.append(Row(what, "us", taken[name], taken["floor"], taken["ray"], checks))
    return rows


def _on(make: Callable[[], Any], measure: Callable[[Any], Any]) -> Contestant:
    async def contestant() -> float:
        async with make() as cluster:
            actor = await cluster.spawn(Source)
            with _apart(await actor.pid()):
                return float(await measure(actor))

    return contestant


@contextlib.contextmanager
def _apart(pid: int) -> Iterator[None]:
    """This thread on one core, all of that process on another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        yield
        return
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {cores[1]})
    os.sched_setaffinity(0, {cores[0]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


async def _drain(stream: AsyncIterator[bytes], count: int) -> float:
    start = time.perf_counter()
    got = 0
    async for _ in stream:
        got += 1
    taken = time.perf_counter() - start
    assert got == count
    return taken / count


async def _calls(call: Callable[[], Any], count: int) -> float:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# Ray.


@contextlib.contextmanager
def _ray() -> Any:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


async def _ray_items(count: int, size: int) -> float:
    import ray

    actor = ray.remote(Source).options(num_cpus=0).remote()
    with _apart(await actor.pid.remote()):
        start = time.perf_counter()
        got = 0
        async for item in actor.items.options(num_returns="streaming").remote(count, size):
            await item
            got += 1
        taken = time.perf_counter() - start
    assert got == count
    ray.kill(actor)
    return taken / count


async def _ray_calls(count: int) -> float:
    import ray

    actor = ray.remote(Source).options(num_cpus=0).remote()
    with _apart(await actor.pid.remote()):
        taken = await _calls(lambda: actor.same.remote(1), count)
    ray.kill(actor)
    return taken


# A bare loop: asyncio's own streams, frames of a length and 64 payloads.

_HEAD = struct.Struct(">III")


def _bare(family: socket.AddressFamily, measure: Callable[[Any, Any], Any]) -> Contestant:
    async def contestant() -> float:
        ours, theirs = _pair(family)
        child = os.fork()
        if not child:
            ours.close()
            _serve_bare(theirs)
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=2**20)
        try:
            with _apart(child):
                return float(await measure(reader, writer))
        finally:
            writer.close()
            await writer.wait_closed()
            await asyncio.to_thread(os.waitpid, child, 0)

    return contestant


def _pair(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    if family is socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def _serve_bare(sock: socket.socket) -> None:
    """Serve one connection in a forked process, on a new event loop, and leave nothing to the parent's clean-up."""
    asyncio._set_running_loop(None)
    try:
        asyncio.run(_answer_bare(sock))
    finally:
        os._exit(0)


async def _answer_bare(sock: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=sock, limit=2**20)
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            count, size, number = _HEAD.unpack(await reader.readexactly(_HEAD.size))
            if not count:
                writer.write(_HEAD.pack(0, 0, number))
                continue
            encode, pending = msgspec.msgpack.Encoder().encode, []
            async for item in Source().items(count, size):
                pending.append(encode(item))
                if len(pending) == _FRAME_ITEMS:
                    await _write_bare(writer, pending)
            await _write_bare(writer, pending)


async def _write_bare(writer: asyncio.StreamWriter, pending: list[bytes]) -> None:
    sizes = b"".join(len(payload).to_bytes(4, "big") for payload in pending)
    body = b"".join(pending)
    writer.write(_HEAD.pack(len(pending), len(body), 0) + sizes + body)
    await writer.drain()
    pending.clear()


async def _bare_items(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int, size: int) -> float:
    decode = msgspec.msgpack.Decoder(bytes).decode
    start = time.perf_counter()
    writer.write(_HEAD.pack(count, size, 0))
    got = 0
    while got < count:
        async for _ in _read_bare(reader, decode):
            got += 1
    return (time.perf_counter() - start) / count


async def _read_bare(reader: asyncio.StreamReader, decode: Callable[[Any], bytes]) -> AsyncGenerator[bytes, None]:
    number, length, _ = _HEAD.unpack(await reader.readexactly(_HEAD.size))
    data = await reader.readexactly(4 * number + length)
    at = 4 * number
    view = memoryview(data)
    for index in range(number):
        end = at + int.from_bytes(data[4 * index : 4 * index + 4], "big")
        yield decode(view[at:end])
        at = end


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.write(_HEAD.pack(0, 0, 1))
    return int(_HEAD.unpack(await reader.readexactly(_HEAD.size))[2])


# Idle streams, in this module's own process.


async def _idle(count: int) -> None:
    from arun.channel import Limits, connect_tcp, serve_tcp

    waiting, all_wait = 0, asyncio.Event()

    async def wait(method: str, payload: Any) -> AsyncIterator[int]:
        nonlocal waiting
        waiting += 1
        if waiting == count:
            all_wait.set()
        await asyncio.Event().wait()
        yield 0

    limits, token = Limits(streams=count), os.urandom(32)
    server = await serve_tcp(wait, token=token, limits=limits)
    connection = await connect_tcp("127.0.0.1", int(server.address[1]), token=token, limits=limits)
    before = _resident()
    streams = [connection.open("wait") for _ in range(count)]
    await all_wait.wait()
    memory = _resident() - before
    turns, loop = 0, asyncio.get_running_loop()
    run_once = loop._run_once  # type: ignore[attr-defined]  # asyncio's own: what is counted

    def counted() -> None:
        nonlocal turns
        turns += 1
        run_once()

    loop._run_once = counted  # type: ignore[attr-defined]  # as above
    start = time.process_time()
    await asyncio.sleep(3)
    print(memory, (time.process_time() - start) / 3, turns)
    del streams
    await connection.aclose()
    await server.aclose()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


if __name__ == "__main__":
    asyncio.run(_idle(int(sys.argv[1])))
