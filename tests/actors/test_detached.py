"""Detached actors and pools: several programs on a Ray that none of them started."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from actors import Reset
from actors.bundles import Placement
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from actors.members.lives import ActorRestarted
from actors.members.supervision import Backoff, Supervisor
from actors.on_ray.detached_host import NAMESPACE, delay_of_restart
from actors.ray_cluster import RayCluster
from arun import Ok
from arun.channel import connect_tcp
from arun.errors import (
    ActorDied,
    ActorNotFound,
    ChannelLost,
    EngineError,
    MisuseError,
    PlacementError,
    RemoteError,
    ReplicaLost,
    RequestQuarantined,
)
from tests.actors.fragile import Fragile
from tests.actors.programs import ENVIRONMENT, ROOT, wait_gone
from tests.actors.samples import Counter, FailsToStart, HangsAtStart, Wide
from tests.faults.nemesis import cut

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from actors.engine import EngineInfo
    from actors.pool import EnginePool

on_ray = [pytest.mark.ray, pytest.mark.timeout(90), pytest.mark.asyncio(loop_scope="module")]

AT_ONCE = Backoff(first=0.0)


# Without a Ray


def test_a_restart_waits_longer_each_time_and_has_a_budget() -> None:
    supervisor = Supervisor(intensity=2, period=10, backoff=Backoff(first=1, factor=3))
    assert delay_of_restart(supervisor, [], 100) == 1
    assert delay_of_restart(supervisor, [100], 105) == 3
    with pytest.raises(ActorDied, match=r"it is not started again: it was restarted 2 times in the last 6 s"):
        delay_of_restart(supervisor, [100, 105], 106)
    assert delay_of_restart(supervisor, [100, 105], 115) == 1


@pytest.mark.asyncio
async def test_nothing_can_be_detached_from_a_local_cluster() -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(MisuseError, match=r"end with it\. Start a Ray that runs by itself"):
            await cluster.spawn(Counter, name="counter", lifetime="detached")
        with pytest.raises(MisuseError, match="nothing can be detached from a LocalCluster"):
            await cluster.engines(EngineSpec(model="echo", engine="echo"), name="chat", lifetime="detached").start()
        with pytest.raises(MisuseError, match="nothing can be detached from a LocalCluster"):
            await cluster.pool("chat").start()
        assert cluster.list() == []
        with pytest.raises(MisuseError, match="must be 'scope' or 'detached'"):
            await cluster.spawn(Counter, lifetime="forever")  # type: ignore[arg-type]  # wrong on purpose


# On a Ray that runs by itself


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    try:
        nodes.add_node(num_cpus=4, include_dashboard=False)
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(address: str) -> AsyncIterator[RayCluster]:
    async with RayCluster.connect(address, placement_timeout=5) as cluster:
        yield cluster


def environment() -> dict[str, str]:
    """Of the programs: they come with a token if the Ray of this process wants one, as it does after a ray.init()."""
    return ENVIRONMENT | {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}


async def run(*arguments: str) -> list[int]:
    """Run one of the programs to its end; returns the pids that it prints."""
    command = [sys.executable, "-m", "tests.actors.ray_programs", *arguments]
    program = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    told, _ = await program.communicate()
    assert program.returncode == 0
    return [int(word) for word in told.split()]


async def first_line_of(*arguments: str) -> tuple[asyncio.subprocess.Process, str]:
    """Start one of the programs; returns it with the first line that it prints."""
    command = [sys.executable, "-m", "tests.actors.ray_programs", *arguments]
    program = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment(), stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    return program, (await program.stdout.readline()).decode().strip()


def groups_left() -> int:
    from ray.util import placement_group_table

    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


async def gone(pids: list[int]) -> None:
    assert await asyncio.to_thread(wait_gone, pids, 15) == []


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - what other processes do is told to nobody here
        await asyncio.sleep(0.02)


async def only_groups_left(count: int = 0) -> None:
    await until(lambda: groups_left() == count)


def in_flight(engines: list[EngineInfo]) -> int:
    return sum(engine.load.in_flight for engine in engines)


class TestActors:
    pytestmark = on_ray

    async def test_one_lives_on_after_its_program_and_is_found_by_another(
        self, cluster: RayCluster, address: str
    ) -> None:
        [pid] = await run("leave", address, "shared")
        counter = await cluster.get("shared", Counter)
        assert (await counter.incr(), await counter.pid()) == (43, pid)
        assert [n async for n in counter.count_to(3)] == [0, 1, 2]
        assert await cluster.spawn(Counter, name="shared", lifetime="detached", get_if_exists=True) is counter
        assert str((await cluster.health(counter)).state) == "alive"
        with pytest.raises(MisuseError, match="is no Wide"):
            await cluster.get("shared", Wide)
        with pytest.raises(MisuseError, match="'shared' exists already"):
            await cluster.spawn(Counter, name="shared", lifetime="detached")
        await cluster.stop(counter)
        await gone([pid])
        with pytest.raises(ActorDied, match="was stopped"):
            await counter.incr()
        with pytest.raises(ActorNotFound, match=r"no actor is named 'shared'; .* detached in this Ray: none"):
            await cluster.get("shared")

    async def test_a_killed_program_leaves_what_is_detached_and_nothing_else(
        self, cluster: RayCluster, address: str
    ) -> None:
        program, pid = await first_line_of("hold", address, "held")
        assert groups_left() == 1
        program.kill()
        await gone([int(pid)])
        await only_groups_left()
        held = await cluster.get("held", Wide)
        while "hang cancelled" not in await held.notes():  # the dead program's call
            pass
        await cluster.stop("held")

    async def test_it_is_stopped_by_its_name_alone(self, cluster: RayCluster, address: str) -> None:
        [pid] = await run("leave", address, "lonely")
        await cluster.stop("lonely")
        await gone([pid])

    async def test_a_killed_one_is_started_again_and_followed(self, cluster: RayCluster, tmp_path: Path) -> None:
        supervisor = Supervisor(intensity=3, backoff=AT_ONCE)
        actor = await cluster.spawn(Fragile, str(tmp_path), name="phoenix", lifetime="detached", restarts=supervisor)
        assert await actor.incr() == 1
        pid = await actor.pid()
        events = cluster.monitor(actor)
        lost, retried = asyncio.create_task(actor.hang()), asyncio.create_task(actor.hang_once())
        await until(lambda: (tmp_path / "hung").exists() and (tmp_path / "hanging").exists())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ActorDied, match=rf"actor 'phoenix' \(Fragile, pid {pid}\) died"):
            await lost
        assert await retried == await actor.pid() != pid
        assert await actor.incr() == 1  # what was in memory is lost
        assert (tmp_path / "starts").read_text().split() == ["fragile"] * 2
        assert ActorRestarted in [type(await anext(events)) for _ in range(3)]
        await cluster.stop(actor)
        assert (tmp_path / "stops").read_text() == "fragile\n"

    async def test_a_client_whose_connection_is_cut_attaches_again(self, cluster: RayCluster, tmp_path: Path) -> None:
        actor = await cluster.spawn(Fragile, str(tmp_path), name="reached", lifetime="detached", concurrency=2)
        [info] = cluster.list()
        for count in (1, 2):
            lost = asyncio.create_task(actor.hang())
            await until((tmp_path / "hanging").exists)
            (tmp_path / "hanging").unlink()
            cut(info.address)
            with pytest.raises(ChannelLost):
                await lost
            assert await actor.incr() == count
        assert (await actor.pid(), (await cluster.health(actor)).state) == (info.pid, "alive")
        await cluster.stop(actor)

    async def test_one_that_dies_too_often_is_given_up_with_the_reason(
        self, cluster: RayCluster, tmp_path: Path
    ) -> None:
        supervisor = Supervisor(intensity=1, backoff=AT_ONCE)
        actor = await cluster.spawn(Fragile, str(tmp_path), name="doomed", lifetime="detached", restarts=supervisor)
        for _ in range(2):
            os.kill(await actor.pid(), signal.SIGKILL)
            with pytest.raises(ActorDied):
                await actor.hang()
        with pytest.raises(
            ActorDied, match=r"'doomed'.*it was restarted 1 time in the last [\d.]+ s, and its supervisor"
        ):
            await actor.incr()
        with pytest.raises(ActorNotFound):
            await cluster.stop("doomed")

    async def test_one_without_restarts_is_not_started_again(self, cluster: RayCluster, tmp_path: Path) -> None:
        actor = await cluster.spawn(Fragile, str(tmp_path), name="mortal", lifetime="detached")
        os.kill(await actor.pid(), signal.SIGKILL)
        with pytest.raises(ActorDied, match="'mortal'"):
            await actor.hang()
        with pytest.raises(ActorDied, match="it is not started again: its restart policy is 'temporary'"):
            await actor.incr()
        another = await cluster.spawn(Fragile, str(tmp_path), name="mortal", lifetime="detached", get_if_exists=True)
        assert await another.incr() == 1
        await cluster.stop(another)

    async def test_one_that_does_not_start_leaves_nothing(self, cluster: RayCluster, tmp_path: Path) -> None:
        with pytest.raises(RemoteError, match="refused in on_start"):
            await cluster.spawn(FailsToStart, "on_start", name="stillborn", lifetime="detached")
        starting = asyncio.create_task(
            cluster.spawn(HangsAtStart, str(tmp_path / "starts"), name="stillborn", lifetime="detached")
        )
        await until((tmp_path / "starts").exists)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        with pytest.raises(ActorNotFound):
            await cluster.get("stillborn")

    async def test_every_client_has_a_token_that_is_worth_nothing_once_it_has_left(self, cluster: RayCluster) -> None:
        import ray

        await cluster.spawn(Counter, name="guarded", lifetime="detached")
        token = secrets.token_bytes(32)
        actor: Any = ray.get_actor("guarded", namespace=NAMESPACE)
        where = await actor.attach.remote(token)
        with pytest.raises(ChannelLost, match="another token"):
            await connect_tcp(where.host, where.port, token=secrets.token_bytes(32))
        connection = await connect_tcp(where.host, where.port, token=token)
        assert await connection.call("incr", {}) == 1
        await connection.aclose()

        async def connect_again() -> None:
            while True:  # until the actor has seen it leave
                await (await connect_tcp(where.host, where.port, token=token)).aclose()

        with pytest.raises(ChannelLost, match="another token"):
            await connect_again()
        assert await (await cluster.get("guarded", Counter)).incr() == 2
        await cluster.stop("guarded")

    async def test_what_would_hang_its_callers_or_could_not_be_found_is_refused(self, cluster: RayCluster) -> None:
        reservation = await cluster.reserve(Placement())
        with pytest.raises(MisuseError, match="would wait for ever"):
            await cluster.spawn(Counter, name="x", lifetime="detached", group=reservation.groups[0])
        await reservation.release()
        with pytest.raises(MisuseError, match="needs name="):
            await cluster.spawn(Counter, lifetime="detached")
        with pytest.raises(MisuseError, match="knows of no others that rely on it"):
            await cluster.spawn(Counter, name="x", lifetime="detached", restarts=Supervisor("rest_for_one"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(cluster: RayCluster, address: str) -> AsyncIterator[EnginePool]:
    """A pool that another program started and left."""
    await run("leave_pool", address, "chat")
    async with cluster.pool("chat") as pool:
        yield pool
    await pool.close()
    await only_groups_left()


def echo(**options: Any) -> EngineSpec:
    return EngineSpec(model="echo", engine="echo", engine_args=options)


class TestPools:
    pytestmark = on_ray

    async def test_several_programs_share_its_engines(self, pool: EnginePool, cluster: RayCluster) -> None:
        assert [replica.state for replica in pool.stats().replicas] == ["ready", "ready"]
        assert [delta.text async for delta in pool.generate("to be or")] == ["to", " be", " or"]
        outcomes = [outcome async for outcome in pool.map(["a b", "c d"] * 10)]
        assert {outcome.value.text for outcome in outcomes if isinstance(outcome, Ok)} == {"a b", "c d"}
        other = cluster.engines(echo(), name="chat", lifetime="detached", get_if_exists=True)
        async with other:
            assert (await other.complete("x")).text == "x"
        assert (await pool.complete("y")).text == "y"
        with pytest.raises(MisuseError, match=r"cluster.pool\('chat'\) attaches to it"):
            await cluster.engines(echo(), name="chat", lifetime="detached").start()
        assert len(await pool.info()) == len(await pool.metrics()) == 2
        await pool.scale(1)
        await until(lambda: len(pool.stats().replicas) == 1)
        await pool.scale(2)
        await pool.drain(0)
        assert (await pool.complete("z")).text == "z"
        await pool.scale(2)

    async def test_a_client_that_is_killed_has_its_requests_aborted(self, pool: EnginePool, address: str) -> None:
        program, word = await first_line_of("ask", address, "chat")
        assert word == "for"
        program.kill()
        await program.wait()
        while in_flight(await pool.info()):
            pass

    async def test_leaving_a_stream_aborts_its_request(self, pool: EnginePool) -> None:
        stream = pool.generate("for ever", max_tokens=1_000_000, ignore_eos=True)
        await anext(stream)
        assert stream.replica is not None
        assert in_flight(await pool.info()) == 1
        await stream.aclose()
        assert in_flight(await pool.info()) == 0

    async def test_an_answer_goes_on_when_its_replica_is_killed(self, pool: EnginePool) -> None:
        words = " ".join(f"w{n}" for n in range(300))
        stream = pool.generate(words, max_tokens=300)
        deltas = [await anext(stream) for _ in range(3)]
        [victim] = [each.pid for each in pool.stats().replicas if each.replica == stream.replica]
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        deltas += [delta async for delta in stream]
        assert "".join(delta.text for delta in deltas) == words

    async def test_what_kills_replicas_is_quarantined_for_everybody(self, pool: EnginePool) -> None:
        with pytest.raises(RequestQuarantined):
            await pool.complete("killer")
        assert (await pool.complete("still here")).text == "still here"

    async def test_a_killed_supervisor_is_started_again_and_leaves_no_engine(
        self, pool: EnginePool, cluster: RayCluster
    ) -> None:
        [supervisor] = [info.pid for info in cluster.list() if info.name == "pool/chat"]
        assert supervisor is not None
        engines = [replica.pid for replica in pool.stats().replicas if replica.pid is not None]
        lost, anew = (
            pool.generate("for ever", max_tokens=1_000_000, ignore_eos=True),
            pool.generate("a b " * 600, max_tokens=1200, reroute="restart"),
        )
        await anext(lost)
        await anext(anew)
        whole = asyncio.create_task(pool.complete("c d " * 400, max_tokens=800))
        await asyncio.sleep(0)
        os.kill(supervisor, signal.SIGKILL)
        with pytest.raises(ReplicaLost, match="the supervisor of pool 'chat' was lost"):
            async for _ in lost:
                pass
        await gone(engines)
        deltas = [delta async for delta in anew]
        after = deltas[[isinstance(delta, Reset) for delta in deltas].index(True) + 1 :]
        assert "".join(delta.text for delta in after) == ("a b " * 600).strip()
        assert (await whole).usage.completion_tokens == 800
        assert groups_left() == 2  # those of the dead one are gone

    async def test_closing_it_ends_it_for_everybody(self, cluster: RayCluster, address: str) -> None:
        before = groups_left()
        pids = await run("leave_pool", address, "short")
        async with cluster.pool("short") as pool:
            stream = pool.generate("for ever", max_tokens=1_000_000, ignore_eos=True)
            await anext(stream)
            await pool.close()
            with pytest.raises(EngineError, match="closed before the answer was complete"):
                async for _ in stream:
                    pass
        await gone(pids)
        await only_groups_left(before)
        with pytest.raises(ActorNotFound, match="there is no detached pool 'short'"):
            await cluster.pool("short").start()

    async def test_closing_one_that_was_refused_leaves_the_other_of_its_name_alone(
        self, pool: EnginePool, cluster: RayCluster
    ) -> None:
        refused = cluster.engines(echo(), name=pool.name, lifetime="detached")
        with pytest.raises(MisuseError, match="already"):
            await refused.start()
        await refused.close()
        missing = cluster.pool("missing")
        with pytest.raises(ActorNotFound, match="there is no detached pool 'missing'"):
            await missing.start()
        await missing.close()
        assert (await pool.complete("a b")).text == "a b"

    async def test_one_that_does_not_start_leaves_nothing(self, cluster: RayCluster) -> None:
        before = groups_left()
        bad = cluster.engines(echo(fail_start="out of memory"), name="bad", lifetime="detached")
        with pytest.raises(EngineError, match="out of memory"):
            await bad.start()
        await bad.close()  # in a `finally`, it must not hide the error
        with pytest.raises(PlacementError, match="5 CPU in all"):
            await cluster.engines(echo(), name="bad", lifetime="detached", cpus=5).start()
        with pytest.raises(ActorNotFound):
            await cluster.pool("bad").start()
        await only_groups_left(before)
