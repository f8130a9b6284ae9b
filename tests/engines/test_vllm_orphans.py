"""vLLM's processes end with their owner, however and whenever that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

OWNER = """
import asyncio
from actors.engine import EngineSpec
from actors.vllm_engine import VLLMEngine

async def main():
    engine = VLLMEngine(EngineSpec(model="tiny", max_model_len=256))
    await engine.start()
    print("ready", flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.fixture
def owner():
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_a_killed_owner_leaves_no_process_no_socket_and_no_shared_memory(owner, descendants, shared_memory):
    before = shared_memory()
    assert owner.stdout.readline() == "ready\n"
    processes = descendants(owner.pid)
    assert any("EngineCore" in command for command in processes.commands.values())
    folder = next(c.split()[-1] for c in processes.commands.values() if "/guards.py" in c)
    assert shared_memory() > before
    os.kill(owner.pid, signal.SIGKILL)
    assert processes.wait_gone(timeout=10) == []  # the guard among them, after it has cleaned up
    assert not os.path.exists(folder)
    assert shared_memory() == before
    assert owner.communicate() == ("", "")  # vLLM keeps its talk to itself


def test_an_owner_killed_while_the_engine_starts_leaves_no_process(owner, descendants):
    while not any("spawn_main" in command for command in descendants(owner.pid).commands.values()):
        assert owner.poll() is None
        time.sleep(0.05)  # no event says that a grandchild was started
    processes = descendants(owner.pid)
    os.kill(owner.pid, signal.SIGKILL)
    assert processes.wait_gone(timeout=10) == []
