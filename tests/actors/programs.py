"""Running programs of our own, and waiting for processes to be gone."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
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


def parents() -> dict[int, int]:
    """The parent of every process that runs; of an engine's guard, which is nobody's child, whom it guards."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            # "pid (any name) state parent ...", and the name may have spaces and brackets.
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (process / "cmdline").read_bytes().split(b"\0")
            guards = [
                at for at, word in enumerate(command) if word == b"engine" and command[at - 1].endswith(b"/guards.py")
            ]
            if state != "Z":
                found[int(process.name)] = int(command[guards[0] + 1]) if guards else int(parent)
    return found


def descendants(root: int) -> dict[int, str]:
    """The processes that a process has started, and those that these have: what each runs, by its pid."""
    of = parents()
    found: dict[int, str] = {}
    for pid in of:
        ancestor: int | None = of[pid]
        while ancestor is not None and ancestor != root:
            ancestor = of.get(ancestor)
        if ancestor == root:
            with suppress(OSError):
                found[pid] = command_of(pid)
    return found


def command_of(pid: int) -> str:
    """What a process runs."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


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
