"""Watches processes for their end."""

from __future__ import annotations

import os
import select


class Gone:
    """Watches processes, by handles that can't be of another process with the same id."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def watch(self, *pids: int) -> None:
        for pid in pids:
            self._fds[pid] = os.pidfd_open(pid)

    def left(self, seconds: float = 20) -> list[int]:
        """Wait for the end of all; those that have not ended."""
        left: list[int] = []
        for pid, fd in self._fds.items():
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                left.append(pid)
        return left

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
