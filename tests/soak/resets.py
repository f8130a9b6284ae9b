"""Rapid reset: a client opens and cancels as fast as it may, another one calls, a server serves both."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
from anyio import to_process

from arun.channel import Limits, connect_tcp, serve_tcp
from arun.channel.messages import Cancel, End, Fail, Open
from tests.channel.attack.peers import NIL, TOKEN, RawPeer, frame, resident

NAME = "resets"
HELP = "10,000 opened and cancelled streams a second, 20 s long: what it does to the calls of others"

_SECONDS = 20.0
_A_SECOND = 10_000
_BATCH = 50
_STREAMS = 200


def run(seconds: float, seed: int) -> int:
    """Attack for 20 seconds, or less if less is given.

    :returns: 0, or 1 if calls became twice as slow, or the server grew by 20 MB, or ran more handlers than it may.
    """
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.soak.resets"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        return asyncio.run(_run(int(server.stdout.readline()), min(seconds, _SECONDS)))
    finally:
        server.kill()
        server.wait()


async def _run(port: int, seconds: float) -> int:
    client = await connect_tcp("127.0.0.1", port, token=TOKEN)
    try:
        await _calls(client, seconds / 10)  # what is made once
        quiet = await _calls(client, seconds / 4)
        before = await client.call("look", result_type=dict[str, int])
        async with asyncio.TaskGroup() as tasks:
            attack = tasks.create_task(to_process.run_sync(_attack, port, seconds))
            under_attack = await _calls(client, seconds)
        after = await client.call("look", result_type=dict[str, int])
    finally:
        await client.aclose()
    grown = after["memory"] - before["memory"]
    ratio = _p99(under_attack) / _p99(quiet)
    print(
        f"  calls of others: p99 {_p99(quiet) * 1e3:.2f} ms, under attack {_p99(under_attack) * 1e3:.2f} ms "
        f"({ratio:.2f} x); {attack.result():,} resets got through, {after['started']:,} handlers ran, "
        f"{after['most']} at most at a time; "
        f"memory {grown / 1e6:+.1f} MB"
    )
    held = ratio < 2 and grown < 20 * 2**20 and after["most"] <= _STREAMS and after["running"] == 0
    return 0 if held else 1


async def _calls(client: Any, seconds: float) -> list[float]:
    taken = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.perf_counter()
        await client.call("answer", 1)
        taken.append(time.perf_counter() - began)
        await asyncio.sleep(0.002)
    return taken


def _p99(taken: list[float]) -> float:
    return sorted(taken)[len(taken) * 99 // 100]


# The attacker's process.


def _attack(port: int, seconds: float) -> int:
    return asyncio.run(_reset(port, seconds))


async def _reset(port: int, seconds: float) -> int:
    """Half of the streams are cancelled in the frame that opens them, half when their handlers have begun."""
    peer = await RawPeer.connect(("127.0.0.1", port))
    began = time.monotonic()
    opened = 0
    slots = anyio.Semaphore(_STREAMS)  # beyond what it may have it would be cut off

    async def count_ends() -> None:
        while True:
            for message in await peer.receive():
                if isinstance(message, End | Fail):
                    slots.release()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_ends)
        with anyio.move_on_after(seconds):
            while True:
                for _ in range(_BATCH):
                    await slots.acquire()
                numbers = range(opened + 1, opened + _BATCH + 1)
                at_once, later = numbers[: _BATCH // 2], numbers[_BATCH // 2 :]
                opens = {n: Open(n, "run", 1, 1, NIL) for n in numbers}
                await peer.stream.send(frame(*(said for n in at_once for said in (opens[n], Cancel(n)))))
                await peer.stream.send(frame(*(opens[n] for n in later)))
                await peer.stream.send(frame(*map(Cancel, later)))
                opened += _BATCH
                await asyncio.sleep(max(0.0, began + opened / _A_SECOND - time.monotonic()))
        tasks.cancel_scope.cancel()
    await peer.stream.aclose()
    return opened


# The server's process.


async def _serve() -> None:
    running = most = started = 0

    async def handle(method: str, payload: Any) -> Any:
        nonlocal running, most, started
        if method == "answer":
            yield payload
            return
        if method == "look":
            yield {"memory": resident(), "running": running, "most": most, "started": started}
            return
        running += 1
        started += 1
        most = max(most, running)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.001)
            running -= 1

    server = await serve_tcp(handle, token=TOKEN, limits=Limits(streams=_STREAMS))
    print(server.address[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)  # to the end of whoever started this
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_serve())
