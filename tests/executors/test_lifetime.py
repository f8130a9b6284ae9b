"""That nothing is left of worker processes, however their program ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from executor_fan import pid_of
from executor_gone import Gone

from arun import MisuseError, ProcessExecutor, Runtime


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_end_of_the_runtime_ends_the_processes_and_the_executor_serves_the_next_one(
    backend: str, gone: Gone
) -> None:
    executor = ProcessExecutor(1)

    async def use() -> int:
        async with Runtime():
            pid = await pid_of(executor)
            gone.watch(pid)
            return pid

    first = anyio.run(use, backend=backend)
    assert gone.left(0) == []
    assert anyio.run(use, backend=backend) != first
    assert gone.left(0) == []


def test_on_asyncio_the_end_of_the_event_loop_is_enough(gone: Gone) -> None:
    executor = ProcessExecutor(1)

    async def use() -> None:
        gone.watch(await pid_of(executor))

    anyio.run(use)
    assert gone.left(0) == []


def test_on_trio_a_runtime_is_asked_for() -> None:
    with pytest.raises(MisuseError, match=r"async with arun\.Runtime"):
        anyio.run(pid_of, ProcessExecutor(1), backend="trio")


def test_no_processes_at_all_are_refused() -> None:
    with pytest.raises(MisuseError, match="at least 1"):
        ProcessExecutor(0)


# -- programs of their own -------------------------------------------------------------------------------------------


HEAD = """
import os, sys, threading
import anyio
from arun import *
from arun.registry import register
from dataclasses import dataclass

@register
@dataclass
class Point:
    x: int

@action(reads=["value"], writes=["out"])
def main_function(state):
    if state["value"] == "hold":
        print(os.getpid(), flush=True)
        while True: pass
    print("said", state["value"])
    print("complained", state["value"], file=sys.stderr)
    return state.update(out=(state["value"], os.getpid()))

@action(reads=["value"], writes=["out"])
async def main_coroutine(state):
    print(os.getpid(), flush=True)
    if state["value"] == "block":
        while True: pass
    await anyio.sleep_forever()

class Fan(TaskBasedParallelAction):
    reads, writes = [], ["outs"]
    def __init__(self, subject, *values): self.subject, self.values = subject, values
    def tasks(self, state, context, inputs):
        for value in self.values:
            yield SubGraphTask(self.subject, State({"value": value}))
    async def reduce(self, state, states):
        return state.update(outs=[done["out"] async for done in states])

def run(executor, *fan):
    async def main():
        async with Runtime():
            app = ApplicationBuilder().with_actions(fan=Fan(*fan)).with_executor(executor).build()
            return (await app.arun()).state["outs"]
    return anyio.run(main, backend=BACKEND)
"""


@pytest.fixture(params=["asyncio", "trio"])
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program of HEAD and some more lines; a session of its own, as a terminal would give it."""
    started: list[subprocess.Popen[str]] = []

    def start(lines: str, *options: str) -> subprocess.Popen[str]:
        path = tmp_path / "program.py"
        path.write_text(f"BACKEND = {request.param!r}\n{HEAD}\n{textwrap.dedent(lines)}\n")
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *(options or (str(path),))],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_actions_and_types_of_the_main_module_work_and_prints_arrive_in_whole_lines(
    program: Callable[..., subprocess.Popen[str]],
) -> None:
    process = program(
        """
        if __name__ == "__main__":
            values = [Point(n) for n in range(50)]
            outs = run(ProcessExecutor(2), main_function, *values)
            assert sorted((value for value, pid in outs), key=lambda p: p.x) == values, outs
            assert all(type(value) is Point and pid != os.getpid() for value, pid in outs)
        """
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    lines = [f"Point(x={n})" for n in range(50)]
    assert sorted(line for line in out.splitlines() if "said" in line) == sorted(f"said {line}" for line in lines)
    complaints = [line for line in err.splitlines() if "complained" in line]  # beside the watchdog, on a busy machine
    assert sorted(complaints) == sorted(f"complained {line}" for line in lines)


def test_a_main_module_that_is_started_by_name_works_too(program: Callable[..., subprocess.Popen[str]]) -> None:
    lines = """
        if __name__ == "__main__":
            print("outs", [value for value, pid in run(ProcessExecutor(1), main_function, 7)])
        """
    out, err = program(lines, "-m", "program").communicate()
    assert "outs [7]" in out, err


def test_a_main_module_without_a_guard_is_told_to_have_one(program: Callable[..., subprocess.Popen[str]]) -> None:
    _, err = program("run(ProcessExecutor(1), main_function, 7)").communicate()
    assert 'Put what the program does at its start below `if __name__ == "__main__":`' in err


def test_an_action_of_a_session_without_a_file_is_refused(program: Callable[..., subprocess.Popen[str]]) -> None:
    lines = f"BACKEND = 'asyncio'\n{HEAD}\nrun(ProcessExecutor(1), main_function, 7)"
    _, err = program("", "-c", lines).communicate()
    assert "action 'main_function'" in err
    assert "is defined in a session that has no file" in err


@pytest.mark.parametrize(
    ("subject", "value", "end"),
    [
        ("main_function", "hold", signal.SIGKILL),
        ("main_coroutine", "wait", signal.SIGKILL),
        ("main_coroutine", "block", signal.SIGKILL),
        ("main_function", "hold", signal.SIGTERM),
        ("main_function", "hold", signal.SIGINT),
        ("main_coroutine", "wait", signal.SIGINT),
    ],
)
def test_the_processes_end_with_their_program_whatever_ends_it(
    program: Callable[..., subprocess.Popen[str]], gone: Gone, subject: str, value: str, end: signal.Signals
) -> None:
    process = program(
        f"""
        if __name__ == "__main__":
            run(ProcessExecutor(1, grace=0.2), {subject}, {value!r})
        """
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    while "debug" in line:  # structlog, as nobody has configured it
        line = process.stdout.readline()
    gone.watch(int(line))
    if end == signal.SIGINT:  # Ctrl-C reaches the whole foreground group
        os.killpg(process.pid, end)
    else:
        process.send_signal(end)
    process.wait()
    assert gone.left() == []


def test_a_program_that_closes_nothing_leaves_nothing(
    program: Callable[..., subprocess.Popen[str]], gone: Gone
) -> None:
    process = program(
        """
        if __name__ == "__main__":
            import asyncio
            loop = asyncio.new_event_loop()
            executor = ProcessExecutor(2)
            app = ApplicationBuilder().with_actions(fan=Fan(main_function, 1, 2, 3)).with_executor(executor).build()
            loop.run_until_complete(app.arun())
            async def pids(): return executor.pids
            print("pids", *loop.run_until_complete(pids()), flush=True)
        """
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pids"):
            gone.watch(*map(int, line.split()[1:]))
            break
    process.communicate()
    assert gone.left() == []
