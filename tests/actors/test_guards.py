"""What guards end when their owner is gone, whoever kills whom: the processes of an engine, the servers of a Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from actors.hosts.guards import RayGuard
from tests.actors.programs import ENVIRONMENT, ROOT, children, descendants, wait_gone

RAYLET = "/tmp/arun-test/sockets/raylet"  # nothing is there

OWNER = """
import subprocess, sys
from actors.hosts.guards import EngineGuard

guard = EngineGuard()
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
def test_nothing_is_left_of_what_the_owner_of_an_engine_has_started(end: str) -> None:
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


def test_a_worker_of_ray_that_has_not_begun_to_work_ends_with_its_raylet_and_no_other_does() -> None:
    # As Ray starts its workers; a real one is at this point for too short a time to be met.
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        subprocess.Popen([*asleep, f"--raylet-name={RAYLET}"]) as worker,
        subprocess.Popen([*asleep, f"--raylet-name={RAYLET}.1"]) as other,
    ):
        RayGuard(SimpleNamespace(all_processes={}, raylet_socket_name=RAYLET)).close()
        assert worker.wait() == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
