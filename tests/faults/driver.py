"""Rounds in a program of their own: to its end, or until it is killed at a seeded moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random

import msgspec

from tests.actors.programs import ENVIRONMENT, ROOT, descendants, wait_gone
from tests.faults.checker import problems
from tests.faults.history import engine_records, owner_records
from tests.faults.nemesis import left_over, marked, shared_memory
from tests.faults.rounds import ORPHAN_SECONDS, Setting, files

__all__ = ("kill_owner", "start", "wait_for")


def start(setting: Setting, first: int, rounds: int, *more: str) -> subprocess.Popen[str]:
    """Start the program."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.faults",
            *("--cluster", setting.cluster, "--engine", setting.engine, "--faults", str(setting.faults)),
            *("--first", str(first), "--rounds", str(rounds), *more),
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(program: subprocess.Popen[str]) -> list[str]:
    """Wait for its end.

    :return: everything that is wrong.
    """
    said, errors = program.communicate()
    found = [line for line in said.splitlines() if line.startswith("problem: ")]
    return found or [errors] * (program.returncode != 0)


def kill_owner(setting: Setting, seed: int, *, after: int) -> list[str]:
    """Kill the program -9 in the midst of a round, and see what is left of it.

    :param after: rounds that it does before.
    :return: everything that is wrong.
    """
    moment = Random(f"owner {seed}").randrange(1, 10)  # hundreds of deltas; a round has some 15 of them
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        with start(setting, seed, after + 2, "--folder", folder) as owner:
            assert owner.stdout is not None
            assert owner.stderr is not None
            for line in owner.stdout:
                after -= line.startswith("seed ")
                moment -= line.startswith("deltas ") and after == 0
                if moment == 0:
                    break
            else:
                return [f"the program ended by itself: {owner.stderr.read()}"]
            owned = marked(Path(folder)) | descendants(owner.pid)
            memory = shared_memory(owned)
            os.kill(owner.pid, signal.SIGKILL)
        killed = time.monotonic()
        late = {pid: owned[pid] for pid in wait_gone(list(owned), ORPHAN_SECONDS)}
        left = late | left_over(Path(folder), ORPHAN_SECONDS - (time.monotonic() - killed))
        found = [f"{ORPHAN_SECONDS} s after its owner was killed there is {pid} {left[pid]}" for pid in left]
        for pid in left:
            if wait_gone([pid], 30):
                os.kill(pid, signal.SIGKILL)
                found.append(f"{pid} had to be killed")
            else:
                found.append(f"{pid} was gone after {time.monotonic() - killed:.0f} s")
        found += [f"its owner was killed, and left {name}" for name in sorted(files(Path(folder, "tmp")))]
        found += [f"its owner was killed, and left /dev/shm/{entry.name}" for entry in os.scandir("/dev/shm")
                  if entry.inode() in memory]  # fmt: skip
        promise = msgspec.structs.replace(setting.promise, to_the_end=False)
        return found + problems(owner_records(Path(folder)), engine_records(Path(folder)), promise)
