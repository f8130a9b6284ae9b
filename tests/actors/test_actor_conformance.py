"""What every actor does, whatever cluster it lives in: LocalCluster's processes and tasks, and Ray's processes."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
import pytest

from actors.bundles import Placement
from arun.errors import ActorDied, ActorNotFound, ArunError, ChannelLost, MisuseError, PlacementError, RemoteError
from tests.actors.arrays import Arrays
from tests.actors.conftest import make_cluster
from tests.actors.fragile import Fragile
from tests.actors.programs import wait_gone
from tests.actors.samples import Counter, Diary, FailsToStart, HangsAtStart, Point, Wide
from tests.faults.nemesis import cut

if TYPE_CHECKING:
    from actors.cluster import Cluster

pytestmark = pytest.mark.asyncio

needs_process = pytest.mark.parametrize(
    "kind", ["process", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(120)])], indirect=True
)


async def noted(actor: Any, text: str) -> None:
    """Wait until the actor has written something down."""
    while text not in await actor.notes():
        pass


# Calls


async def test_a_call_returns_the_methods_result(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter, start=3)
    assert await counter.incr(2) == 5
    assert await counter.incr(by=10) == 15
    assert await counter.incr() == 16


async def test_arguments_and_results_are_decoded_by_their_annotations(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    assert await counter.mirror(Point(1, 2)) == Point(2, 1)
    assert await counter.mirror({"x": 1}) == Point(0, 1)
    assert await counter.total(Point(1), Point(2, 3), extra=4) == 10


async def test_arrays_are_arguments_results_and_items(cluster: Cluster) -> None:
    arrays = await cluster.spawn(Arrays)
    large = np.ones((300, 1000))
    assert (await arrays.scale(large, by=3)).sum() == 900_000
    assert [row.sum() async for row in arrays.rows(large[:5])] == [1000] * 5
    with pytest.raises(MisuseError, match=r"values is wrong: Expected `numpy\.ndarray`, got `str`"):
        await arrays.scale("many")


async def test_an_argument_of_the_wrong_type_is_refused_by_name(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    with pytest.raises(MisuseError, match=r"Counter\.incr: its argument by is wrong: Expected `int`, got `str`"):
        await counter.incr("two")
    with pytest.raises(MisuseError, match=r"named is wrong: Expected `int` >= 0"):
        await counter.total(extra=-1)
    assert await counter.incr() == 1


async def test_arguments_that_do_not_fit_are_refused_before_anything_is_sent(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'step'.*Counter\.incr\(by: int = 1\) -> int"):
        counter.incr(step=2)
    with pytest.raises(TypeError, match="too many positional arguments"):
        counter.count_to(1, 2)
    with pytest.raises(TypeError, match="missing a required argument: 'n'"):
        counter.count_to()


async def test_messages_are_taken_one_at_a_time_in_order_of_arrival(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    assert await asyncio.gather(*(counter.busy(ticks) for ticks in (9, 0, 5, 2))) == [1, 1, 1, 1]
    await asyncio.gather(*(counter.note(str(i)) for i in range(20)))
    assert await counter.notes() == [str(i) for i in range(20)]


async def test_concurrency_lets_that_many_messages_run_at_once(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide)
    assert max(await asyncio.gather(*(wide.busy(50) for _ in range(10)))) == 3
    wider = await cluster.spawn(Wide, concurrency=5)
    assert max(await asyncio.gather(*(wider.busy(50) for _ in range(10)))) == 5


async def test_an_error_arrives_as_itself_with_the_actors_traceback(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    with pytest.raises(ValueError, match="no such luck") as caught:
        await counter.raise_value_error()
    assert "in raise_value_error" in "".join(caught.value.__notes__)
    with pytest.raises(RemoteError, match="Unheard: what is this") as unheard:
        await counter.raise_unheard()
    assert unheard.value.kind.endswith("Unheard")
    assert await counter.incr() == 1


async def test_a_method_may_raise_the_cancellation_of_a_task_that_it_awaits(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide)
    with pytest.raises(ArunError, match="'await_cancelled' raised CancelledError"):
        await wide.await_cancelled()
    assert await wide.incr() == 1


async def test_a_cancelled_call_is_cancelled_in_the_actor(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide)
    call = asyncio.create_task(wide.hang())
    await noted(wide, "hanging")
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await noted(wide, "hang cancelled")


async def test_a_handle_has_the_methods_of_its_actor_and_nothing_else(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide, name="wide")
    assert {name for name in dir(wide) if not name.startswith("_")} == {
        name for name in vars(Counter) | vars(Wide) if not name.startswith("_")
    }
    with pytest.raises(AttributeError, match=r"'wide' \(Wide\) has no method 'decr'; it has incr, watch"):
        _ = wide.decr
    assert repr(wide).startswith("<actor 'wide' (Wide, pid ")
    assert "incr(by: int = 1) -> int" in repr(wide.incr)


# Streams


async def test_a_stream_gives_every_item_in_order_and_ends(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    assert [n async for n in counter.count_to(1000)] == list(range(1000))
    assert [n async for n in counter.count_to(0)] == []


async def test_a_stream_that_fails_gives_its_items_first(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    stream = counter.fail_slowly(3)
    assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the stream broke"):
        await anext(stream)


async def test_calls_are_answered_while_somebody_watches(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    stream = counter.watch()
    assert await anext(stream) == 0
    assert await counter.incr(5) == 5
    while await anext(stream) != 5:
        pass
    await stream.aclose()


async def test_closing_a_stream_waits_for_the_methods_clean_up(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    stream = counter.watch()
    await anext(stream)
    await stream.aclose()
    assert await counter.notes() == ["watch closed"]
    await stream.aclose()
    assert await counter.notes() == ["watch closed"]


async def test_a_dropped_stream_is_closed_in_the_actor(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter)
    stream = counter.watch()
    await anext(stream)
    del stream
    gc.collect()
    await noted(counter, "watch closed")


# Life


async def test_on_start_comes_first_and_stop_waits_for_on_stop(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "diary"
    diary = await cluster.spawn(Diary, str(path))
    assert path.read_text() == "diary started\n"
    assert await diary.ping() == "pong"
    await cluster.stop(diary)
    assert path.read_text() == "diary started\ndiary stopped\n"
    await cluster.stop(diary)


async def test_a_closed_cluster_has_stopped_its_actors_in_reverse_order(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "diary"
    async with make_cluster(kind) as cluster:
        for title in "abc":
            await cluster.spawn(Diary, str(path), title=title)
        pids = {info.pid for info in cluster.list()} - {os.getpid(), None}
    assert path.read_text().split("\n")[3:6] == ["c stopped", "b stopped", "a stopped"]
    assert await asyncio.to_thread(wait_gone, pids, 10) == []
    assert cluster.list() == []
    await cluster.aclose()
    with pytest.raises(MisuseError, match="closed"):
        await cluster.spawn(Counter)


async def test_a_cluster_closes_also_when_its_body_fails(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "diary"

    async def fail() -> None:
        async with make_cluster(kind) as cluster:
            await cluster.spawn(Diary, str(path))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert path.read_text() == "diary started\ndiary stopped\n"


async def test_a_cluster_closes_to_the_end_also_when_it_is_cancelled_meanwhile(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "diary"
    cluster = make_cluster(kind)
    await cluster.__aenter__()
    await cluster.spawn(Diary, str(path))
    closing = asyncio.create_task(cluster.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert path.read_text() == "diary started\ndiary stopped\n"


async def test_stopping_fails_what_is_open_and_what_comes_after(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide, name="wide")
    call = asyncio.create_task(wide.hang())
    stream = wide.watch()
    await noted(wide, "hanging")
    await cluster.stop(wide)
    stopped = r"actor 'wide' \(Wide, pid \d+\) was stopped"
    with pytest.raises(ActorDied, match=stopped):
        await call
    with pytest.raises(ActorDied, match=stopped):
        async for _ in stream:
            pass
    with pytest.raises(ActorDied, match=stopped):
        await wide.incr()
    with pytest.raises(ActorDied, match=stopped):
        await anext(wide.watch())
    assert cluster.list() == []


async def test_an_error_of_the_constructor_is_the_spawners(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="refused in __init__") as caught:
        await cluster.spawn(FailsToStart, "init")
    assert "in __init__" in "".join(caught.value.__notes__)
    assert cluster.list() == []


async def test_an_error_of_on_start_is_the_spawners(cluster: Cluster) -> None:
    with pytest.raises(RemoteError, match="Unheard: refused in on_start"):
        await cluster.spawn(FailsToStart, "on_start")
    assert cluster.list() == []


@needs_process
async def test_a_process_that_ends_while_starting_says_how(cluster: Cluster) -> None:
    with pytest.raises(
        ActorDied, match=r"actor 'brief' \(FailsToStart, pid \d+\) (exited by itself with code 3|died: )"
    ):
        await cluster.spawn(FailsToStart, "exit", name="brief")
    assert cluster.list() == []


async def test_constructor_arguments_that_do_not_fit_are_refused_before_anything_starts(cluster: Cluster) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'begin'.*Counter\(start: 'int' = 0\)"):
        await cluster.spawn(Counter, begin=3)


@needs_process
async def test_a_cancelled_spawn_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    os.mkfifo(path)
    spawning = asyncio.create_task(cluster.spawn(HangsAtStart, str(path)))
    pid = int(await asyncio.to_thread(path.read_text))  # waits for it to be written
    spawning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await spawning
    assert cluster.list() == []
    assert await asyncio.to_thread(wait_gone, [pid], 10) == []


@needs_process
async def test_a_spawn_in_a_cancelled_scope_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    os.mkfifo(path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cluster.spawn, HangsAtStart, str(path))
        pid = int(await asyncio.to_thread(path.read_text))  # waits for it to be written
        tasks.cancel_scope.cancel()
    assert cluster.list() == []
    assert await asyncio.to_thread(wait_gone, [pid], 10) == []


# Names


async def test_actors_are_found_by_name(cluster: Cluster) -> None:
    counter = await cluster.spawn(Counter, name="tally")
    assert await cluster.get("tally") is counter
    info = cluster.list()[0]
    assert (info.name, info.actor_class, info.alive) == ("tally", "Counter", True)
    assert info.pid == await counter.pid()
    with pytest.raises(MisuseError, match="'tally' exists already"):
        await cluster.spawn(Counter, name="tally")
    with pytest.raises(ActorNotFound, match="no actor is named 'tallly'; this cluster has: 'tally'"):
        await cluster.get("tallly")
    await cluster.stop(counter)
    with pytest.raises(ActorNotFound, match="this cluster has: none"):
        await cluster.get("tally")
    await cluster.spawn(Counter, name="tally")


async def test_a_cluster_does_not_stop_the_actors_of_another(cluster: Cluster, kind: str) -> None:
    counter = await cluster.spawn(Counter)
    async with make_cluster(kind) as other:
        with pytest.raises(MisuseError, match="no actor of this cluster"):
            await other.stop(counter)
    assert await counter.incr() == 1


# Processes


@needs_process
async def test_an_actor_has_a_process_and_an_environment_of_its_own(cluster: Cluster) -> None:
    one = await cluster.spawn(Counter, env={"ARUN_TEST": "one"})
    two = await cluster.spawn(Counter)
    assert len({os.getpid(), await one.pid(), await two.pid()}) == 3
    assert await one.environ("ARUN_TEST") == "one"
    assert await two.environ("ARUN_TEST") is None


@needs_process
async def test_an_actor_that_ends_itself_fails_its_open_calls_with_actor_died(cluster: Cluster) -> None:
    wide = await cluster.spawn(Wide)
    waiting = asyncio.create_task(wide.hang())
    await noted(wide, "hanging")
    with pytest.raises(ActorDied):
        await wide.leave()
    with pytest.raises(ActorDied):
        await waiting
    with pytest.raises(ActorDied):
        await wide.incr()


@needs_process
async def test_a_killed_actor_fails_its_open_calls_and_streams_with_actor_died(cluster: Cluster, kind: str) -> None:
    wide = await cluster.spawn(Wide, name="victim")
    call = asyncio.create_task(wide.hang())
    stream = wide.watch()
    await anext(stream)
    await noted(wide, "hanging")
    pid = await wide.pid()
    os.kill(pid, signal.SIGKILL)
    how = "was killed by signal 9 \\(SIGKILL\\)" if kind == "process" else "died: "
    died = rf"actor 'victim' \(Wide, pid {pid}\) {how}"
    with pytest.raises(ActorDied, match=died):
        await call
    with pytest.raises(ActorDied, match=died):
        async for _ in stream:
            pass
    with pytest.raises(ActorDied, match=died):
        await wide.incr()
    assert [info.alive for info in cluster.list()] == [False]


@needs_process
async def test_a_cut_connection_loses_what_is_in_flight_and_the_actor_goes_on(cluster: Cluster, kind: str) -> None:
    wide = await cluster.spawn(Wide, name="wide", start=3)
    call = asyncio.create_task(wide.hang())
    stream = wide.watch()
    await anext(stream)
    await noted(wide, "hanging")
    [info] = cluster.list()
    cut(info.address)
    with pytest.raises(ChannelLost):
        await call
    assert await wide.incr() == 4
    with pytest.raises(ChannelLost):
        async for _ in stream:  # what had arrived comes first
            pass
    await noted(wide, "hang cancelled")
    await noted(wide, "watch closed")
    stream = wide.watch()
    await anext(stream)
    cut(info.address)
    with pytest.raises(ChannelLost):
        async for _ in stream:
            pass
    assert await wide.incr() == 5
    assert await wide.pid() == info.pid
    assert (await cluster.health(wide)).generation == 1


@needs_process
async def test_an_idempotent_call_on_a_cut_connection_is_sent_again(
    cluster: Cluster, kind: str, tmp_path: Path
) -> None:
    fragile = await cluster.spawn(Fragile, str(tmp_path), concurrency=2)
    [info] = cluster.list()
    call = asyncio.create_task(fragile.hang_once())
    while not (tmp_path / "hung").exists():
        await fragile.incr()
    cut(info.address)
    assert await call == info.pid


# Placements


async def test_an_actor_is_placed_in_a_reserved_group(cluster: Cluster) -> None:
    reservation = await cluster.reserve(Placement(tensor_parallel=2, replicas=2, cpus=1))
    assert [group.replica for group in reservation.groups] == [0, 1]
    counter = await cluster.spawn(Counter, group=reservation.groups[1])
    assert await counter.incr() == 1
    await reservation.release()
    with pytest.raises(ActorDied, match="was stopped"):
        await counter.incr()
    await reservation.release()
    with pytest.raises(MisuseError, match="released"):
        await cluster.spawn(Counter, group=reservation.groups[0])


async def test_a_released_reservation_makes_room_for_the_next(cluster: Cluster) -> None:
    everything = Placement(replicas=4, cpus=1)
    for _ in range(3):
        reservation = await cluster.reserve(everything)
        await reservation.release()


async def test_a_placement_that_never_fits_is_refused_with_the_numbers(cluster: Cluster) -> None:
    with pytest.raises(PlacementError, match="room for 2 of 3; each needs 2 workers on one node") as caught:
        await cluster.reserve(Placement(tensor_parallel=2, replicas=3, cpus=1))
    assert "6 CPU in all" in str(caught.value)
    assert "of 4 CPU free" in str(caught.value)
    with pytest.raises(PlacementError, match="3 GPU in all"):
        await cluster.reserve(Placement(replicas=3, gpus=1))


async def test_resources_tell_what_is_there(cluster: Cluster) -> None:
    resources = await cluster.resources()
    assert (resources.cpus, resources.gpus) == (4, 2)
