"""What is left of a Ray when the program that started it is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace

from actors.on_ray.ray_servers import ServersGuard

RAYLET = "/tmp/arun-test/sockets/raylet"  # nothing is there


def test_a_worker_that_has_not_begun_to_work_ends_with_its_raylet_and_no_other_does() -> None:
    # As Ray starts its workers; a real one is at this point for too short a time to be met.
    asleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        subprocess.Popen([*asleep, f"--raylet-name={RAYLET}"]) as worker,
        subprocess.Popen([*asleep, f"--raylet-name={RAYLET}.1"]) as other,
    ):
        ServersGuard(SimpleNamespace(all_processes={}, raylet_socket_name=RAYLET)).close()
        assert worker.wait() == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
