"""Running programs of our own, and waiting for processes to be gone."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait until these processes have ended; return those that have not within the time."""
    deadline = time.monotonic() + seconds
    left: list[int] = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([fd], [], [], max(0, deadline - time.monotonic()))[0]:
                left.append(pid)
        finally:
            os.close(fd)
    return left


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
