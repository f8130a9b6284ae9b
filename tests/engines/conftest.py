from __future__ import annotations

import os
import select
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Processes:
    """All descendants that a process has now, to be waited for after it is gone."""

    def __init__(self, root: int) -> None:
        self.commands: dict[int, str] = {}
        self._pidfds: dict[int, int] = {}
        self._add_children(root)

    def _add_children(self, parent: int) -> None:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                try:
                    self._pidfds[pid] = os.pidfd_open(pid)
                    self.commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except ProcessLookupError:
                    continue
                self._add_children(pid)

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
def descendants() -> Callable[[int], Processes]:
    return Processes
