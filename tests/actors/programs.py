"""Running programs of our own, and waiting for processes to be gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

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
    """The processes that a process started, from whatever thread."""
    return [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]


@contextmanager
def owner_program(module: str, *args: str, **environment: str) -> Generator[tuple[subprocess.Popen[str], list[int]]]:
    """Run a program that prints the pids that it is responsible for; whatever it leaves is killed.

    :returns: the program and the pids.
    """
    pids: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-m", module, *args],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stderr is not None
            line = owner.stdout.readline()
            if not line:
                pytest.fail(owner.stderr.read())
            pids += map(int, line.split())
            yield owner, pids
        finally:
            owner.kill()
            for pid in wait_gone(pids, 0):
                os.kill(pid, signal.SIGKILL)
