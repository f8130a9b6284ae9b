"""Programs on a Ray that runs by itself; each does one thing and prints what the test wants to know.

usage: python -m tests.actors.ray_programs WHAT ADDRESS [ARGUMENT...]
"""

from __future__ import annotations

import asyncio
import sys

import structlog

from actors.bundles import Placement
from actors.engine import EngineSpec
from actors.members.supervision import Backoff, Supervisor
from actors.ray_cluster import RayCluster
from tests.actors.samples import Counter, Wide


async def leave(address: str, name: str) -> None:
    """Start a detached actor, use it, and go."""
    async with RayCluster.connect(address) as cluster:
        counter = await cluster.spawn(
            Counter, 40, name=name, lifetime="detached", restarts=Supervisor(intensity=2, backoff=Backoff(first=0.0))
        )
        await counter.incr(2)
        print(await counter.pid(), flush=True)


async def hold(address: str, name: str) -> None:
    """Start a detached actor, and one that is not, in a group; print their pids and wait to be killed."""
    async with RayCluster.connect(address) as cluster:
        detached = await cluster.spawn(Wide, name=name, lifetime="detached")
        reservation = await cluster.reserve(Placement())
        scoped = await cluster.spawn(Wide, group=reservation.groups[0])
        print(await scoped.pid(), flush=True)
        await detached.hang()


async def leave_pool(address: str, name: str) -> None:
    """Start a detached pool, use it, and go."""
    spec = EngineSpec(model="echo", engine="echo", engine_args={"token_seconds": 0.002, "die_on": "killer"})
    async with RayCluster.connect(address) as cluster:
        seen: list[str] = []
        pool = cluster.engines(
            spec,
            name=name,
            lifetime="detached",
            replicas=2,
            restarts=Supervisor(intensity=20, backoff=Backoff(first=0.0)),
            on_progress=lambda progress: seen.append(progress.state),
        )
        async with pool:
            assert (await pool.complete("to be")).text == "to be"
            assert "ready" in seen, seen
            print(*[replica.pid for replica in pool.stats().replicas], flush=True)


async def ask(address: str, name: str) -> None:
    """Ask a detached pool for an answer without an end, print its first word, and wait to be killed."""
    async with RayCluster.connect(address) as cluster, cluster.pool(name) as pool:
        async for delta in pool.generate("for ever", max_tokens=1_000_000, ignore_eos=True):
            print(delta.text, flush=True)


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run({f.__name__: f for f in (leave, hold, leave_pool, ask)}[sys.argv[1]](*sys.argv[2:]))
