"""A program that owns actors, to be ended in every way that a program can end. Prints its actors' pids, then ends.

usage: python owner.py HOW DIARY
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time

import structlog

from actors.local_cluster import LocalCluster
from tests.actors.samples import Diary, Parent, Wide


async def main(how: str, diary: str) -> None:
    cluster = LocalCluster(grace=2)
    async with cluster:
        await cluster.spawn(Diary, diary)
        wide = await cluster.spawn(Wide)
        parent = await cluster.spawn(Parent)
        grandchild = await parent.start_child()
        pids = [info.pid for info in cluster.list()]
        call = asyncio.create_task(wide.hang())
        while "hanging" not in await wide.notes():
            pass
        if how == "forked":
            # A forked child holds a copy of every pipe of ours and lives on.
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
            child.start()
            print("forked", child.pid, file=sys.stderr, flush=True)
        print(*pids, grandchild, flush=True)
        match how:
            case "exception":
                raise RuntimeError("the body failed")
            case "sys.exit":
                sys.exit(7)
            case "os._exit":
                os._exit(7)
            case "return":
                return
            case "twice":  # as Ctrl-C pressed twice: the loop ends without any clean-up
                signal.signal(signal.SIGINT, signal.default_int_handler)
        await call


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(*sys.argv[1:]))
