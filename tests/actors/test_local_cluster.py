"""LocalCluster: what only processes of our own do, and that nothing is left of them however their owner ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.bundles import Placement
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from arun.errors import ActorDied, ChannelLost, MisuseError, PlacementError
from tests.actors.programs import ENVIRONMENT, children, owner_program, wait_gone
from tests.actors.samples import Counter, Deaf, Parent, Stubborn
from tests.faults.nemesis import cut

# Exit


@pytest.mark.parametrize(
    "how", ["return", "exception", "sys.exit", "os._exit", "SIGINT", "SIGTERM", "SIGKILL", "twice"]
)
def test_nothing_is_left_however_the_owner_ends(how: str, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with owner_program("tests.actors.owner", how, str(diary), TMPDIR=str(temporary)) as (owner, pids):
        assert len(pids) == 4
        if how.startswith("SIG"):
            owner.send_signal(getattr(signal, how))
        elif how == "twice":
            owner.send_signal(signal.SIGINT)
        owner.communicate(timeout=10)
        assert wait_gone(pids, 10) == []
    assert diary.read_text() == "diary started\ndiary stopped\n"
    assert list(temporary.iterdir()) == []  # also where the owner could take nothing away: then its actors do
    expected = {"return": 0, "sys.exit": 7, "os._exit": 7, "SIGTERM": -15, "SIGKILL": -9, "SIGINT": -2, "twice": -2}
    assert owner.returncode == expected.get(how, 1)


def test_actors_end_with_their_owner_also_when_a_forked_child_holds_their_pipes(tmp_path: Path) -> None:
    with owner_program("tests.actors.owner", "forked", str(tmp_path / "diary")) as (owner, pids):
        [forked] = [pid for pid in children(owner.pid) if pid not in pids]
        owner.kill()
        owner.wait(10)
        try:
            assert wait_gone(pids, 10) == []
        finally:
            os.kill(forked, signal.SIGKILL)


def test_an_owner_that_ends_before_its_actor_has_heard_of_it_leaves_no_folder(tmp_path: Path) -> None:
    program = """
        import asyncio, os, sys
        from actors.local_cluster import LocalCluster
        from tests.actors.samples import Counter

        async def main():
            async with LocalCluster() as cluster:
                asyncio.create_task(cluster.spawn(Counter))
                await asyncio.sleep(0)
                print(*os.listdir(os.environ["TMPDIR"]))
                sys.stdout.flush()
                os._exit(0)

        asyncio.run(main())
    """
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = run_program(program, tmp_path, TMPDIR=str(temporary))
    assert done.stdout.startswith("arun-"), done.stderr  # the process was started, and that is all
    while list(temporary.iterdir()):
        pass


def test_actors_end_with_their_owner_also_when_they_are_stopped(tmp_path: Path) -> None:
    with owner_program("tests.actors.owner", "SIGKILL", str(tmp_path / "diary")) as (owner, pids):
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        owner.kill()
        assert wait_gone(pids, 10) == []


@pytest.mark.asyncio
async def test_an_actor_that_does_not_stop_is_killed_after_the_grace() -> None:
    async with LocalCluster(grace=0.2) as cluster:
        stubborn = await cluster.spawn(Stubborn)
        assert await stubborn.ping() == "pong"
        [info] = cluster.list()
        assert info.pid is not None
        await cluster.stop(stubborn)
        assert wait_gone([info.pid], 0) == []


@pytest.mark.asyncio
async def test_what_an_actor_started_ends_with_it() -> None:
    async with LocalCluster() as cluster:
        stopped, killed = await cluster.spawn(Parent, name="stopped"), await cluster.spawn(Parent, name="killed")
        grandchildren = [await stopped.start_child(), await killed.start_child()]
        await cluster.stop(stopped)
        victim = cluster.list()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(ActorDied):
            await killed.start_child()
        assert await asyncio.to_thread(wait_gone, grandchildren, 5) == []


def test_nothing_is_left_when_an_actor_and_its_owner_are_killed_at_once(tmp_path: Path) -> None:
    program = """
        import asyncio, os, signal
        from actors.local_cluster import LocalCluster
        from tests.actors.samples import Counter

        async def main():
            async with LocalCluster() as cluster:
                await cluster.spawn(Counter)
                for pid in (cluster.list()[0].pid, os.getpid()):
                    os.kill(pid, signal.SIGKILL)

        asyncio.run(main())
    """
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = run_program(program, tmp_path, TMPDIR=str(temporary))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(temporary.iterdir()) == []


def test_nothing_is_left_of_an_actor_for_which_there_are_too_few_file_descriptors(tmp_path: Path) -> None:
    program = """
        import asyncio, os, resource
        from actors.local_cluster import LocalCluster
        from arun.errors import ArunError
        from tests.actors.samples import Counter

        async def main():
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            async with LocalCluster() as cluster:
                for spare in range(1, 7):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1 + spare, most))
                    try:
                        await cluster.spawn(Counter)
                    except (OSError, ArunError) as exc:  # the actor has the same limit, and may die of it
                        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
                        print(spare, os.listdir(os.environ["TMPDIR"]), cluster.list())

        asyncio.run(main())
    """
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = run_program(program, tmp_path, TMPDIR=str(temporary))
    lines = done.stdout.splitlines()
    assert lines == [f"{spare} [] []" for spare in range(1, 7)], done.stderr


@pytest.mark.asyncio
async def test_a_long_temporary_folder_does_not_make_the_socket_path_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    async with LocalCluster() as cluster:
        assert await (await cluster.spawn(Counter)).incr() == 1
    assert list(long.iterdir()) == []


# Processes


@pytest.mark.asyncio
async def test_who_asks_where_no_connection_can_be_had_is_told_so_and_stalls_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.members.generation._DEATH_NOTICE", 0.1)
    async with LocalCluster(cpus=1) as cluster:
        counter = await cluster.spawn(Deaf)
        stream = counter.watch()
        await anext(stream)
        while (await cluster.health(counter)).state == "silent":  # until there is a connection for it
            pass
        await counter.deafen()
        [info] = cluster.list()
        cut(info.address)
        with pytest.raises(ChannelLost):
            async for _ in stream:  # what had arrived comes first
                pass
        for ask in (counter.incr, lambda: anext(counter.watch())):
            with pytest.raises(ChannelLost, match="whose process runs"):
                await ask()
        assert (await cluster.health(counter)).state in {"alive", "blocked"}  # blocked, on a busy machine


def test_the_handle_of_an_event_loop_that_has_ended_says_so_on_the_next() -> None:
    async def start() -> tuple[LocalCluster, Counter]:
        cluster = LocalCluster(isolation="task")
        return cluster, await cluster.spawn(Counter)

    async def use(cluster: LocalCluster, counter: Counter) -> None:
        for ask in (counter.incr, lambda: anext(counter.watch())):
            with pytest.raises(MisuseError, match="was made on another event loop"):
                await ask()
        await cluster.aclose()

    asyncio.run(use(*asyncio.run(start())))


@pytest.mark.asyncio
async def test_isolation_can_be_chosen_for_each_actor() -> None:
    async with LocalCluster(isolation="task") as cluster:
        here, there = await cluster.spawn(Counter), await cluster.spawn(Counter, isolation="process")
        assert await here.pid() == os.getpid() != await there.pid()
        with pytest.raises(MisuseError, match="needs isolation='process'"):
            await cluster.spawn(Counter, env={"A": "b"})
        with pytest.raises(MisuseError, match="must be 'process' or 'task'"):
            await cluster.spawn(Counter, isolation="thread")  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"A": 1}, "the value of 'A' is of type int; it must be text"),
        ({"A": None}, "the value of 'A' is of type NoneType"),
        ({"A": "secret\0"}, "the value of 'A' has a character"),
        ({"A=B": "c"}, "'A=B' can't be the name"),
        ({"": "c"}, "'' can't be the name"),
        ("A=b", "must be a dict"),
    ],
)
async def test_an_environment_that_no_process_can_have_is_refused_without_showing_values(env: Any, why: str) -> None:
    async with LocalCluster() as cluster:
        with pytest.raises(MisuseError, match=why) as caught:
            await cluster.spawn(Counter, env=env)
        assert "secret" not in str(caught.value)
        assert cluster.list() == []
        with pytest.raises(MisuseError, match=why):
            cluster.engines(EngineSpec(model="echo", engine="echo", env=env))


@pytest.mark.asyncio
async def test_what_an_actor_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    async with LocalCluster() as cluster:
        counter = await cluster.spawn(Counter)
        await counter.print_noise()
    out, err = capfd.readouterr()
    assert "noise" not in out
    assert "noise on stdout" in err


@pytest.mark.asyncio
async def test_arguments_that_cannot_be_pickled_are_refused_by_name() -> None:
    async with LocalCluster() as cluster:
        with pytest.raises(MisuseError, match=r"actor 'c' \(Counter\) can't be sent to a process of its own"):
            await cluster.spawn(Counter, threading.Lock(), name="c")
        assert cluster.list() == []
        await cluster.spawn(Counter, name="c")


def run_program(source: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program that is not importable by its name."""
    path = tmp_path / "program.py"
    log_to_stderr = (
        "import structlog, sys; structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))"
    )
    prelude, body = "from __future__ import annotations", textwrap.dedent(source)
    path.write_text(f"{prelude}\n{log_to_stderr}\n{body}")
    return subprocess.run(
        [sys.executable, str(path)],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_classes_of_a_main_program_work_with_their_types(tmp_path: Path) -> None:
    done = run_program(
        """
        import asyncio
        from collections.abc import AsyncIterator
        from dataclasses import dataclass
        from typing import Annotated
        from msgspec import Meta
        from actors.local_cluster import LocalCluster

        @dataclass
        class Point:
            x: int

        class Mirror:
            def __init__(self, point: Point) -> None:
                self.point = point

            async def add(self, other: Point, times: Annotated[int, Meta(ge=1)] = 1) -> Point:
                assert type(other) is type(self.point), (type(other), type(self.point))
                return Point(self.point.x + times * other.x)

            async def each(self) -> AsyncIterator[Point]:
                yield self.point

        async def main():
            async with LocalCluster() as cluster:
                mirror = await cluster.spawn(Mirror, Point(1))
                print(await mirror.add(Point(2), times=3), [p async for p in mirror.each()])

        if __name__ == "__main__":
            asyncio.run(main())
        """,
        tmp_path,
    )
    assert done.stdout == "Point(x=7) [Point(x=1)]\n", done.stderr


def test_structs_of_a_main_program_are_refused_with_the_way_out(tmp_path: Path) -> None:
    done = run_program(
        """
        import asyncio, msgspec
        from actors.local_cluster import LocalCluster

        class Point(msgspec.Struct):
            x: int

        class Mirror:
            async def get(self, point: Point) -> Point:
                return point

        async def main():
            async with LocalCluster() as cluster:
                try:
                    await cluster.spawn(Mirror)
                except Exception as exc:
                    print(type(exc).__name__, exc)
                mirror = await cluster.spawn(Mirror, isolation="task")
                print(await mirror.get(Point(1)))

        if __name__ == "__main__":
            asyncio.run(main())
        """,
        tmp_path,
    )
    refused, as_task = done.stdout.splitlines()
    assert refused.startswith("MisuseError __main__.Point is a msgspec.Struct that other processes can't import")
    assert "move it into a module" in refused
    assert as_task == "Point(x=1)"


def test_a_class_that_the_process_cannot_import_is_the_spawners_error(tmp_path: Path) -> None:
    done = run_program(
        """
        import asyncio, sys, types
        from actors.local_cluster import LocalCluster

        module = types.ModuleType("nowhere")
        exec("class Lost:\\n    async def ping(self): ...", module.__dict__)
        module.Lost.__module__ = "nowhere"
        sys.modules["nowhere"] = module

        async def main():
            async with LocalCluster() as cluster:
                try:
                    await cluster.spawn(module.Lost)
                except Exception as exc:
                    print(type(exc).__name__, exc, exc.__notes__)

        if __name__ == "__main__":
            asyncio.run(main())
        """,
        tmp_path,
    )
    assert "No module named 'nowhere'" in done.stdout, done.stderr


# Resources


@pytest.mark.asyncio
async def test_reservations_are_counted_and_given_back() -> None:
    async with LocalCluster(cpus=3, gpus=1) as cluster:
        first = await cluster.reserve(Placement(tensor_parallel=2, cpus=1))
        assert (await cluster.resources()).cpus_free == 1
        with pytest.raises(PlacementError, match="1 of 3 CPU free"):
            await cluster.reserve(Placement(tensor_parallel=2, cpus=1))
        await first.release()
        assert (await cluster.resources()).cpus_free == 3


def test_by_default_the_cpus_are_those_that_this_process_may_use() -> None:
    async def cpus() -> float:
        return (await LocalCluster().resources()).cpus

    assert asyncio.run(cpus()) == len(os.sched_getaffinity(0))
