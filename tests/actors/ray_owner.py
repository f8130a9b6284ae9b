"""A program that starts a Ray of its own with an actor in it, to be ended in every way. Prints pids, then ends.

usage: python ray_owner.py HOW DIARY
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest
import structlog

from actors.bundles import Placement
from actors.ray_cluster import RayCluster
from arun.errors import MisuseError
from tests.actors.samples import Diary, Wide
from tests.faults.nemesis import descendants


async def main(how: str, diary: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with RayCluster.connect(num_cpus=2) as cluster:
        assert os.environ["RAY_AUTH_MODE"] == "token"
        with pytest.raises(MisuseError, match="this program started it, and it ends with the block"):
            await cluster.spawn(Wide, name="detached", lifetime="detached")
        reservation = await cluster.reserve(Placement())
        await cluster.spawn(Diary, diary, group=reservation.groups[0])
        wide = await cluster.spawn(Wide)
        victim = await cluster.spawn(Wide)
        os.kill(await victim.pid(), signal.SIGKILL)
        await wide.print_noise()
        call = asyncio.create_task(wide.hang())
        while "hanging" not in await wide.notes():
            pass
        actors = [info.pid for info in cluster.list() if info.alive]
        servers = descendants(os.getpid())
        print(*actors, *servers, flush=True)
        if how == "return":
            call.cancel()
        else:
            await call
    assert signal.getsignal(signal.SIGTERM) is before


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(*sys.argv[1:]))
