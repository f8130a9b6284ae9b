"""The guard of an engine's processes: it ends what their owner leaves, whoever kills whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.actors.programs import ENVIRONMENT, ROOT, children, descendants, wait_gone

OWNER = """
import subprocess, sys
from actors.hosts.parent_watch import ProcessGuard

guard = ProcessGuard()
child = "import subprocess; p = subprocess.Popen(['sleep', '3600']); print('up', flush=True); p.wait()"
subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE).stdout.readline()
print(guard.folder, flush=True)
if sys.stdin.readline() == "close\\n":
    guard.close()
    guard.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("end", ["close", "kill", "kill with children"])
def test_nothing_is_left_of_what_the_owner_has_started(end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        folder = owner.stdout.readline().strip()
        started = descendants(owner.pid)
        assert len(started) == 3  # the guard, the child, and what that has started
        assert len(children(owner.pid)) == 1  # the guard is nobody's child
        if end == "close":
            print("close", file=owner.stdin, flush=True)
            assert owner.stdout.readline() == "closed\n"
        else:
            if end == "kill with children":  # as a worker of Ray does when it exits
                for pid in children(owner.pid):
                    os.kill(pid, signal.SIGKILL)
            owner.kill()
        assert wait_gone(list(started), 10) == []
        assert not os.path.exists(folder)
        owner.kill()
