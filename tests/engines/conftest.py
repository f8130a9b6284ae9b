from __future__ import annotations

import os
import select
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from tests.actors import programs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from actors.pool import EnginePool


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Processes:
    """All descendants that a process has now, to be waited for after it is gone."""

    def __init__(self, root: int) -> None:
        self.commands: dict[int, str] = {}
        self._pidfds: dict[int, int] = {}
        for pid, command in programs.descendants(root).items():
            with suppress(ProcessLookupError):
                self._pidfds[pid] = os.pidfd_open(pid)
                self.commands[pid] = command

    def wait_gone(self, timeout: float) -> list[str]:
        """Wait until all have ended; what still runs after ``timeout`` seconds is returned."""
        poll = select.poll()
        running = {fd: pid for pid, fd in self._pidfds.items()}
        for fd in running:
            poll.register(fd, select.POLLIN)
        while running:
            ended = poll.poll(timeout * 1000)
            if not ended:
                break
            for fd, _ in ended:
                poll.unregister(fd)
                os.close(fd)
                del running[fd]
        return [f"{pid} {self.commands[pid]}" for pid in running.values()]


@pytest.fixture
def shared_memory() -> Callable[[], set[str]]:
    """What of multiprocessing's and vLLM's there is in /dev/shm."""
    return lambda: {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "vllm"))}


@pytest.fixture
def descendants() -> Callable[[int], Processes]:
    return Processes


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny_pool() -> AsyncIterator[EnginePool]:
    """One vLLM engine for all tests that leave it alive."""
    spec = EngineSpec(
        model="tiny",
        max_model_len=512,
        # The random model would go on with white space for ever where JSON allows it.
        engine_args={
            "max_num_seqs": 16,
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    )
    async with LocalCluster(cpus=8) as cluster, cluster.engines(spec, name="tiny") as pool:
        yield pool
