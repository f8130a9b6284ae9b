"""Event loops that end while something runs on them, and Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from arun import Runtime, fan_out

INTERRUPTED = """
import asyncio, sys, threading
import anyio
from arun import MapStates, Policy, State, action, ApplicationBuilder

open_things = set()

@action(reads=["i"], writes=["y"])
async def work(state):
    open_things.add(state["i"])
    try:
        for _ in range(state["i"] % 5):
            await anyio.sleep(0.001)
            yield "item"
        yield state.update(y=1)
    finally:
        open_things.discard(state["i"])

@action(reads=["i"], writes=["y"])
def threaded(state):
    return state.update(y=1)

class Many(MapStates):
    reads, writes = ["inline"], ["y"]
    policy = Policy(limit=20)
    def action(self, state, inputs):
        return work if state["inline"] else threaded
    async def states(self, state, context, inputs):
        open_things.add("source")
        try:
            i = 0
            while True:
                i += 1
                yield state.update(i=i)
        finally:
            open_things.discard("source")
    async def reduce(self, state, states):
        open_things.add("reducer")
        try:
            n = 0
            async for done in states:
                n += 1
                if n == 20:
                    print("running", flush=True)
                yield state.update(y=n)
        finally:
            open_things.discard("reducer")

async def main():
    builder = ApplicationBuilder().with_actions(Many()).with_state(inline=sys.argv[1] == "inline")
    app = builder.with_check("error", blocked_after=60).build()  # a machine that stalls is no news here
    try:
        await app.arun()
    finally:
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        print("left", sorted(map(str, open_things)), others, app._busy, flush=True)

try:
    asyncio.run(main())
except KeyboardInterrupt:
    # Idle workers were told to end, when the loop was closed; the watchdog waits a second for another run.
    left = [t for t in threading.enumerate() if t is not threading.main_thread() and t.name != "arun watchdog"]
    for thread in left:
        thread.join(20)
    print("interrupted", sum(thread.is_alive() for thread in left), flush=True)
"""


@pytest.mark.parametrize("kind", ["inline", "thread"])
@pytest.mark.parametrize("turns", [0, 100, 1000, 10_000])
def test_an_interrupt_at_any_moment_leaves_nothing(kind: str, turns: int, tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(script), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        for _ in range(turns):
            os.getpid()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out.splitlines() == ["left [] [] False", "interrupted 0"]
    assert not err


async def double(n: int) -> int:
    return 2 * n


def test_each_loop_has_a_runtime_of_its_own_and_the_loops_end_cancels_its_work() -> None:
    seen: list[Any] = []

    async def main() -> None:
        seen.append(Runtime.current())
        started = asyncio.Event()
        Runtime.current().start(work, started, name="work")
        await started.wait()

    async def work(started: asyncio.Event) -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            seen.append("cleaned")

    asyncio.run(main())
    asyncio.run(main())
    assert seen[0] is not seen[2]
    assert seen[1] == seen[3] == "cleaned"


def test_a_fan_out_that_outlives_its_loop_is_dropped_quietly() -> None:
    kept: list[Any] = []

    async def main() -> None:
        outcomes = fan_out([double(1), anyio.sleep_forever()])
        await anext(outcomes)
        kept.append(outcomes)

    asyncio.run(main())
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
