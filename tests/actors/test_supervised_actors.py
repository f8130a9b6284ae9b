"""What becomes of an actor that dies, and of the calls to it: the same in LocalCluster's processes and in Ray's."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from actors.actor import link_of
from actors.members.lives import ActorRestarted, ActorStarted, ActorStopped, GaveUp
from actors.members.supervision import Backoff, Supervisor
from arun.errors import ActorDied, ActorNotFound, MailboxFull, MisuseError
from tests.actors.conftest import make_cluster
from tests.actors.fragile import Fragile, Impatient

if TYPE_CHECKING:
    from actors.cluster import Cluster

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.parametrize(
        "kind", ["process", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(120)])], indirect=True
    ),
]

AT_ONCE = Backoff(first=0.0)
NEVER = Backoff(first=3600.0, cap=3600.0)


async def exists(path: Path) -> None:
    """Wait for a file that an actor writes."""
    while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240 - a file is all that another process can tell by
        await asyncio.sleep(0.005)


def lines(path: Path) -> list[str]:
    return path.read_text().split()


async def kill(actor: Any) -> int:
    """Kill the actor's process; returns its pid."""
    pid: int = await actor.pid()
    os.kill(pid, signal.SIGKILL)
    return pid


async def killed(cluster: Cluster, actor: Any) -> None:
    """Kill the actor's process and wait until its cluster knows."""
    events = cluster.monitor(actor)
    await anext(events)
    await kill(actor)
    assert isinstance(await anext(events), ActorDied)


async def restarted(cluster: Cluster, actor: object, generation: int = 2) -> None:
    """Wait until a generation is up."""
    async for event in cluster.monitor(actor):
        if isinstance(event, ActorRestarted) and event.generation == generation:
            return
    pytest.fail(f"it was not restarted: {event}")


async def test_a_killed_actor_is_started_again_in_its_place(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), name="phoenix", restarts=3)
    assert await actor.incr() == 1
    assert await actor.incr() == 2
    first = await kill(actor)
    await restarted(cluster, actor)
    assert await actor.incr() == 1  # what was in memory is lost
    assert await actor.pid() != first
    assert lines(tmp_path / "starts") == ["fragile", "fragile"]
    assert not (tmp_path / "stops").exists()
    assert await cluster.get("phoenix", Fragile) is actor
    [info] = cluster.list()
    assert (info.name, info.generation, info.alive) == ("phoenix", 2, True)
    assert "generation 2" in repr(actor)


async def test_a_call_in_flight_fails_with_actor_died_and_the_next_goes_to_the_new_generation(
    cluster: Cluster, tmp_path: Path
) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), name="phoenix", restarts=Supervisor(backoff=AT_ONCE))
    call = asyncio.create_task(actor.hang())
    await exists(tmp_path / "hanging")
    pid = await kill(actor)
    with pytest.raises(
        ActorDied, match=rf"actor 'phoenix' \(Fragile, pid {pid}\) (was killed by signal 9|died)"
    ) as died:
        await call
    assert (died.value.actor, died.value.generation) == ("phoenix", 1)
    assert await actor.incr() == 1


async def test_a_stream_opened_on_a_connection_that_has_ended_goes_to_the_next_generation(
    cluster: Cluster, tmp_path: Path
) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
    line = link_of(actor).line
    assert line is not None
    await kill(actor)
    line.connection.close_soon()  # as when its end is seen before that of the process
    assert [item async for item in actor.count(3)] == [0, 1, 2]


async def test_an_idempotent_call_in_flight_is_sent_again(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
    call = asyncio.create_task(actor.hang_once())
    await exists(tmp_path / "hung")
    first = await kill(actor)
    assert await call == await actor.pid() != first


async def test_an_idempotent_stream_is_begun_again_only_if_it_has_given_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
    empty = aiter(actor.count_once(first=0))
    begun: list[int] = []

    async def read() -> None:
        begun.extend([n async for n in actor.count_once(first=2)])

    first_item = asyncio.ensure_future(anext(empty))
    await exists(tmp_path / "hung")
    (tmp_path / "hung").unlink()
    reading = asyncio.create_task(read())
    await exists(tmp_path / "hung")
    await kill(actor)
    assert await first_item == 100
    with pytest.raises(ActorDied):
        await reading


async def test_calls_wait_for_a_restart_as_long_as_the_mailbox_has_room(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
    (tmp_path / "hold").touch()
    await killed(cluster, actor)
    assert (await cluster.health(actor)).state != "dead"
    waiting = asyncio.create_task(actor.incr())
    await asyncio.sleep(0)
    with pytest.raises(MailboxFull, match="1 calls wait already"):
        await actor.incr()
    (tmp_path / "hold").unlink()
    assert await waiting == 1


async def test_the_timeout_of_a_call_counts_while_it_waits_for_a_restart(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=NEVER))
    await killed(cluster, actor)
    with pytest.raises(TimeoutError, match=r"Fragile\.hang_with_limit .* took longer than the 0\.05 s"):
        await actor.hang_with_limit()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await actor.incr()


async def test_when_the_budget_is_used_up_the_handle_says_who_died_why_and_how_often(
    cluster: Cluster, tmp_path: Path
) -> None:
    supervisor = Supervisor(intensity=1, backoff=AT_ONCE)
    actor = await cluster.spawn(Fragile, str(tmp_path), name="doomed", restarts=supervisor)
    events = cluster.monitor(actor)
    await kill(actor)
    await restarted(cluster, actor)
    await killed(cluster, actor)
    seen = [event async for event in events]
    assert [type(event) for event in seen] == [ActorStarted, ActorDied, ActorRestarted, ActorDied, GaveUp]
    assert [event.generation for event in seen] == [1, 1, 2, 2, 2]
    with pytest.raises(
        ActorDied,
        match=r"actor 'doomed' \(Fragile, pid \d+, generation 2\) .*; it is not started again: it was restarted 1 time "
        r"in the last [\d.e-]+ s, and its supervisor allows 1 in 60 s",
    ) as died:
        await actor.incr()
    assert (died.value.actor, died.value.generation) == ("doomed", 2)
    assert (await cluster.health(actor)).state == "dead"
    assert [event async for event in cluster.monitor(actor)] == [seen[-1]]


async def test_a_restart_that_fails_counts_as_a_death(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(intensity=2, backoff=AT_ONCE))
    (tmp_path / "refuse").touch()
    await killed(cluster, actor)
    with pytest.raises(ActorDied, match=r"could not be started.*not today.*restarted 2 times"):
        await actor.incr()


async def test_rest_for_one_stops_the_later_ones_in_reverse_and_starts_all_in_order(
    cluster: Cluster, tmp_path: Path
) -> None:
    supervisor = Supervisor("rest_for_one", backoff=AT_ONCE)
    a, b, c = [await cluster.spawn(Fragile, str(tmp_path), title, restarts=supervisor) for title in "abc"]
    pids = [await actor.pid() for actor in (a, b, c)]
    await kill(b)
    await restarted(cluster, c)
    after = [await actor.pid() for actor in (a, b, c)]
    assert [before == now for before, now in zip(pids, after, strict=True)] == [True, False, False]
    assert lines(tmp_path / "stops") == ["c"]
    assert lines(tmp_path / "starts") == ["a", "b", "c", "b", "c"]


async def test_one_for_all_starts_all_in_order_after_stopping_the_others_in_reverse(
    cluster: Cluster, tmp_path: Path
) -> None:
    supervisor = Supervisor("one_for_all", backoff=AT_ONCE)
    _, b, c = [await cluster.spawn(Fragile, str(tmp_path), title, restarts=supervisor) for title in "abc"]
    await kill(b)
    await restarted(cluster, c)
    assert lines(tmp_path / "stops") == ["c", "a"]
    assert lines(tmp_path / "starts") == ["a", "b", "c", "a", "b", "c"]


async def test_actors_under_one_supervisor_share_its_budget(cluster: Cluster, tmp_path: Path) -> None:
    supervisor = Supervisor("rest_for_one", intensity=1, backoff=AT_ONCE)
    first = await cluster.spawn(Fragile, str(tmp_path), name="first", restarts=supervisor)
    second = await cluster.spawn(Fragile, str(tmp_path), name="second", restarts=supervisor)
    await kill(second)
    await restarted(cluster, second)
    await killed(cluster, first)
    with pytest.raises(ActorDied, match=r"'first' .*not started again: it was restarted 1 time"):
        await first.incr()
    with pytest.raises(ActorDied, match=r"'second' .*it relies on actor 'first', which is not started again"):
        await second.incr()


async def test_stopping_does_not_wait_for_a_restart(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), name="waiting", restarts=Supervisor(backoff=NEVER))
    events = cluster.monitor(actor)
    await kill(actor)
    assert isinstance(await anext(events), ActorStarted)
    assert isinstance(await anext(events), ActorDied)
    call = asyncio.create_task(actor.incr())
    await cluster.stop("waiting")
    with pytest.raises(ActorDied, match="was stopped"):
        await call
    assert [type(event) async for event in events] == [ActorStopped]
    assert cluster.list() == []


async def test_a_cluster_closes_while_an_actor_is_being_started_again(kind: str, tmp_path: Path) -> None:
    async with make_cluster(kind) as cluster:
        actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
        (tmp_path / "hold").touch()
        await killed(cluster, actor)
    with pytest.raises(ActorDied, match="was stopped"):
        await actor.incr()


async def test_an_actor_that_hangs_is_killed_after_its_limit(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Impatient, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
    with pytest.raises(ActorDied, match=r"its event loop stood still for [\d.]+ s in .*fragile.py:\d+"):
        await actor.block()
    assert await actor.incr() == 1


async def test_a_busy_actor_is_alive_and_tells_where_it_is_busy(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path))
    assert str(await cluster.health(actor)) == "alive, 0 running, 0 of 1 waiting"
    call = asyncio.create_task(actor.block())
    await exists(tmp_path / "blocking")
    health = await cluster.health(actor)
    assert (health.state, health.running) == ("blocked", 1)
    assert "Fragile.block at " in health.where
    assert f"loop blocked for {health.blocked_for:.1f} s in Fragile." in str(health)
    assert (await cluster.health(actor)).blocked_for > health.blocked_for
    (tmp_path / "go").touch()
    assert await call == "went on"
    assert (await cluster.health(actor)).state == "alive"


async def test_a_stopped_process_counts_as_dead(kind: str, tmp_path: Path) -> None:
    async with make_cluster(kind, silence=0.5) as cluster:
        actor = await cluster.spawn(Fragile, str(tmp_path), restarts=Supervisor(backoff=AT_ONCE))
        call = asyncio.create_task(actor.hang())
        await exists(tmp_path / "hanging")
        pid = await actor.pid()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ActorDied, match=r"was killed: it gave no sign of life for 0\.5 s"):
            await call
        assert await actor.pid() != pid


async def test_an_existing_actor_is_had_by_its_name(cluster: Cluster, tmp_path: Path) -> None:
    one = await cluster.spawn(Fragile, str(tmp_path), name="only", get_if_exists=True)
    assert await cluster.spawn(Fragile, str(tmp_path), name="only", get_if_exists=True) is one
    with pytest.raises(MisuseError, match="is no Impatient"):
        await cluster.spawn(Impatient, str(tmp_path), name="only", get_if_exists=True)
    with pytest.raises(ActorNotFound):
        await cluster.stop("other")


async def test_a_name_that_is_being_started_is_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    first = asyncio.create_task(cluster.spawn(Fragile, str(tmp_path), name="only"))
    while not cluster.list():  # noqa: ASYNC110  # a cluster tells no event of a start that has begun
        await asyncio.sleep(0)
    second = asyncio.create_task(cluster.spawn(Fragile, str(tmp_path), name="only", get_if_exists=True))
    third = asyncio.create_task(cluster.get("only", Fragile))
    await anyio.wait_all_tasks_blocked()
    assert not second.done()
    assert not third.done()
    (tmp_path / "hold").unlink()
    assert await first is await second is await third


async def test_who_waits_for_another_s_start_starts_the_actor_when_that_one_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    asked = [asyncio.create_task(cluster.spawn(Fragile, str(tmp_path), name="only", get_if_exists=True))
             for _ in range(3)]  # fmt: skip
    while not cluster.list():  # noqa: ASYNC110  # a cluster tells no event of a start that has begun
        await asyncio.sleep(0)
    asked[0].cancel()
    await asyncio.wait(asked[:1])
    (tmp_path / "hold").unlink()
    one, other = await asyncio.gather(*asked[1:])
    assert one is other
    assert await one.incr() == 1


async def test_a_name_whose_actor_has_died_is_free_for_the_next(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), name="only")
    await killed(cluster, actor)
    again = await cluster.spawn(Fragile, str(tmp_path), name="only", get_if_exists=True)
    assert again is not actor
    assert await again.incr() == 1
