"""Messages that wait, take too long or go in circles: the same in every kind of cluster."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from actors.actor import actor, method
from actors.local_cluster import LocalCluster
from actors.members.lives import ActorStarted, ActorStopped
from arun.errors import ActorDied, MailboxFull, MisuseError
from tests.actors.fragile import Caller, Fragile, Narrow
from tests.actors.samples import Counter
from tests.actors.test_supervised_actors import exists

if TYPE_CHECKING:
    from pathlib import Path

    from actors.cluster import Cluster

pytestmark = pytest.mark.asyncio


# Timeouts


async def test_a_methods_own_timeout_cancels_it_in_the_actor(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path))
    with pytest.raises(TimeoutError, match=r"Fragile\.hang_with_limit of the actor 'fragile-1' .* the 0\.05 s"):
        await actor.hang_with_limit()
    await exists(tmp_path / "cancelled")


async def test_a_streams_own_timeout_is_for_each_item(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path))
    stream = aiter(actor.stream_with_limit())
    assert await anext(stream) == 1
    with pytest.raises(TimeoutError, match="stream_with_limit"):
        await anext(stream)
    await exists(tmp_path / "cancelled")
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_timeout_around_a_call_cancels_it_in_the_actor(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path))
    with pytest.raises(TimeoutError):
        with anyio.fail_after(0.05):
            await actor.hang()
    await exists(tmp_path / "cancelled")
    assert await actor.incr() == 1


# Mailboxes


async def test_what_a_connection_has_no_room_for_is_refused_like_by_a_full_mailbox(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    watching = [counter.watch() for _ in range(1024)]
    with pytest.raises(MailboxFull, match=r"open at the actor 'counter-1' .*: 1024\. Send fewer at a time"):
        counter.watch()
    with pytest.raises(MailboxFull, match="ask more actors"):
        await counter.incr()
    for stream in watching:
        await stream.aclose()
    assert await counter.incr() == 1


async def test_a_full_mailbox_refuses_the_next_message_and_tells_its_size(cluster: Cluster, tmp_path: Path) -> None:
    narrow = await cluster.spawn(Narrow, str(tmp_path))
    running = asyncio.create_task(narrow.hang())
    await exists(tmp_path / "hanging")
    waiting = asyncio.create_task(narrow.incr())
    await asyncio.sleep(0)  # it is sent
    with pytest.raises(MailboxFull, match=r"mailbox of actor 'narrow-1' is full: 1 messages wait .*narrow-1\.pid"):
        await narrow.pid()
    health = await cluster.health(narrow)
    assert (health.running, health.waiting, health.mailbox) == (1, 1, 1)
    running.cancel()
    assert await waiting == 1
    assert await narrow.incr() == 2


# Monitors


async def test_a_monitor_tells_the_start_and_the_stop_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    actor = await cluster.spawn(Fragile, str(tmp_path), name="watched")
    events = cluster.monitor("watched")
    started = await anext(events)
    assert isinstance(started, ActorStarted)
    assert (started.actor, started.generation, started.pid) == ("watched", 1, await actor.pid())
    await cluster.stop(actor)
    assert [event async for event in events] == [ActorStopped(actor="watched", generation=1)]


async def test_what_is_no_actor_is_refused_by_the_clusters_verbs(cluster: Cluster) -> None:
    for verb in (cluster.stop, cluster.health):
        with pytest.raises(MisuseError, match="is no handle of an actor"):
            await verb(object())


# Cycles


async def callers(cluster: LocalCluster, *names: str, concurrency: int = 1) -> list[Any]:
    """Actors of which each calls the next, and the last the first."""
    lists: list[list[Any]] = [[] for _ in names]
    actors = [
        await cluster.spawn(Caller, others, name=name, concurrency=concurrency)
        for name, others in zip(names, lists, strict=True)
    ]
    for number, others in enumerate(lists):
        others.append(actors[(number + 1) % len(actors)])
    return actors


async def test_a_cycle_of_calls_is_refused_with_its_path() -> None:
    async with LocalCluster(isolation="task") as cluster:
        a, _, _ = await callers(cluster, "a", "b", "c")
        assert await a.ask(2) == 2
        with pytest.raises(MisuseError, match=r"a\.ask -> b\.ask -> c\.ask -> a\.ask, and 'a' takes 1 message"):
            await a.ask(3)
        with pytest.raises(MisuseError, match=r"a\.each -> b\.ask -> c\.ask -> a\.ask"):
            async for _ in a.each(2):
                pass
        assert await a.ask(2) == 2


async def test_an_actor_that_calls_itself_is_refused() -> None:
    async with LocalCluster(isolation="task") as cluster:
        [only] = await callers(cluster, "only")
        with pytest.raises(MisuseError, match=r"only\.ask -> only\.ask"):
            await only.ask(1)


async def test_a_cycle_is_fine_as_long_as_there_are_turns() -> None:
    async with LocalCluster(isolation="task") as cluster:
        a, _ = await callers(cluster, "a", "b", concurrency=2)
        assert await a.ask(3) == 3
        with pytest.raises(MisuseError, match="takes 2 messages at a time"):
            await a.ask(4)


async def test_what_a_method_leaves_running_is_not_held_to_its_turn() -> None:
    async with LocalCluster(isolation="task") as cluster:
        a, _ = await callers(cluster, "a", "b")
        assert await a.later() == "asked"
        while (result := await a.result()) < 0:
            pass
        assert result == 2


# Definitions


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: actor(mailbox=-1),
        lambda: actor(hung_after=0),
        lambda: method(timeout=0),
        lambda: LocalCluster(silence=0),
    ],
)
async def test_options_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError, match="must be"):
        wrong()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restart": "always"}, "must be 'permanent', 'transient' or 'temporary'"),
        ({"restart": "temporary", "restarts": 3}, "means no restart"),
        ({"get_if_exists": True}, "needs name="),
    ],
)
async def test_supervision_that_makes_no_sense_is_refused(options: Any, message: str, tmp_path: Path) -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(MisuseError, match=message):
            await cluster.spawn(Fragile, str(tmp_path), **options)
        assert cluster.list() == []


@pytest.mark.parametrize(("code", "restarted"), [(0, False), (3, True)])
async def test_a_transient_actor_is_started_again_only_after_an_abnormal_end(
    code: int, restarted: bool, tmp_path: Path
) -> None:
    async with LocalCluster() as cluster:
        transient = await cluster.spawn(Fragile, str(tmp_path), restart="transient")
        events = cluster.monitor(transient)
        ending = asyncio.create_task(transient.exit(code))
        seen = [type(await anext(events)).__name__ for _ in range(3)]
        assert seen == ["ActorStarted", "ActorDied", "ActorRestarted" if restarted else "GaveUp"]
        with pytest.raises(ActorDied, match=f"exited by itself with code {code}"):
            await ending
