"""Messages in Ray's own calls, and under TLS: the suite's essential parts over either, and what only they do."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import pytest_asyncio

from actors.on_ray.ray_wire import RayDoor, connect_over_ray
from actors.ray_cluster import RayCluster
from arun.channel import TLSConfig
from arun.errors import ChannelLost, MisuseError
from tests.actors.samples import Counter
from tests.actors.test_actor_conformance import (
    test_a_call_returns_the_methods_result,
    test_a_cancelled_call_is_cancelled_in_the_actor,
    test_a_closed_cluster_has_stopped_its_actors_in_reverse_order,
    test_a_dropped_stream_is_closed_in_the_actor,
    test_a_killed_actor_fails_its_open_calls_and_streams_with_actor_died,
    test_a_stream_gives_every_item_in_order_and_ends,
    test_a_stream_that_fails_gives_its_items_first,
    test_an_error_arrives_as_itself_with_the_actors_traceback,
    test_an_error_of_on_start_is_the_spawners,
    test_calls_are_answered_while_somebody_watches,
    test_closing_a_stream_waits_for_the_methods_clean_up,
    test_messages_are_taken_one_at_a_time_in_order_of_arrival,
    test_on_start_comes_first_and_stop_waits_for_on_stop,
    test_stopping_fails_what_is_open_and_what_comes_after,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from actors.cluster import Cluster

__all__ = (
    "test_a_call_returns_the_methods_result",
    "test_a_cancelled_call_is_cancelled_in_the_actor",
    "test_a_closed_cluster_has_stopped_its_actors_in_reverse_order",
    "test_a_dropped_stream_is_closed_in_the_actor",
    "test_a_killed_actor_fails_its_open_calls_and_streams_with_actor_died",
    "test_a_stream_gives_every_item_in_order_and_ends",
    "test_a_stream_that_fails_gives_its_items_first",
    "test_an_error_arrives_as_itself_with_the_actors_traceback",
    "test_an_error_of_on_start_is_the_spawners",
    "test_calls_are_answered_while_somebody_watches",
    "test_closing_a_stream_waits_for_the_methods_clean_up",
    "test_messages_are_taken_one_at_a_time_in_order_of_arrival",
    "test_on_start_comes_first_and_stop_waits_for_on_stop",
    "test_stopping_fails_what_is_open_and_what_comes_after",
)

pytestmark = [pytest.mark.asyncio, pytest.mark.ray, pytest.mark.timeout(120)]


@pytest.fixture(params=["ray", "tls"])
def way(request: pytest.FixtureRequest, tls: TLSConfig) -> dict[str, Any]:
    return {"transport": "ray"} if request.param == "ray" else {"tls": tls}


@pytest.fixture
def kind() -> str:
    return "ray"


@pytest_asyncio.fixture
async def cluster(ray_session: None, way: dict[str, Any]) -> AsyncIterator[Cluster]:
    async with RayCluster.connect(**way) as cluster:
        yield cluster


class Blocking:
    async def block(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - what must not look dead


async def test_an_actor_reached_over_ray_says_so_and_is_healthy_while_it_is_busy(ray_session: None) -> None:
    async with RayCluster.connect(transport="ray") as cluster:
        actor = await cluster.spawn(Blocking)
        [info] = cluster.list()
        assert info.address.startswith("ray:")
        busy = asyncio.create_task(actor.block(1.5))
        while not (health := await cluster.health(actor)).blocked_for:
            pass
        assert "test_ray_wire.py" in health.where
        await busy


async def test_a_large_payload_goes_over_ray(ray_session: None) -> None:
    async with RayCluster.connect(transport="ray") as cluster:
        counter = await cluster.spawn(Counter)
        await counter.note("x" * 3_000_000)
        assert [len(note) for note in await counter.notes()] == [3_000_000]


async def test_an_actor_under_tls_talks_to_no_client_without_it(ray_session: None, tls: TLSConfig) -> None:
    from arun.channel import connect_tcp

    async with RayCluster.connect(tls=tls) as cluster:
        await cluster.spawn(Counter)
        host, port = cluster.list()[0].address.split(":")
        with pytest.raises(ChannelLost, match="give this side a TLSConfig, too"):
            await connect_tcp(host, int(port), token=os.urandom(32))


async def test_options_that_cannot_go_together_are_refused(ray_session: None, tls: TLSConfig) -> None:
    with pytest.raises(MisuseError, match="no sockets of its own to encrypt"):
        RayCluster.connect(transport="ray", tls=tls)
    with pytest.raises(MisuseError, match="must be 'tcp' or 'ray'"):
        RayCluster.connect(transport="carrier pigeon")  # type: ignore[arg-type]  # what is refused
    async with RayCluster.connect(transport="ray") as cluster:
        with pytest.raises(MisuseError, match="detached actors listen on sockets"):
            await cluster.spawn(Counter, name="stays", lifetime="detached")


# The wire by itself.


class Exposed:
    """A Ray actor with a door, and a look behind it."""

    def __init__(self) -> None:
        self.running = 0
        self._door = RayDoor(self._serve)

    async def _serve(self, method: str, payload: msgspec.Raw) -> AsyncIterator[int]:
        self.running += 1
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def down(self, wire: str) -> AsyncIterator[bytes]:
        frames = self._door.down(wire)
        try:
            async for data in frames:
                yield data
        finally:
            await frames.aclose()

    async def up(self, wire: str, data: bytes) -> None:
        await self._door.up(wire, data)

    async def left(self) -> tuple[int, int]:
        return self.running, self._door.connections


@pytest.fixture
def exposed(ray_session: None) -> Any:
    import ray

    actor = ray.remote(Exposed).remote()
    yield actor
    ray.kill(actor)


async def connected(actor: Any) -> Any:
    return await connect_over_ray(
        lambda wire: actor.down.options(num_returns="streaming").remote(wire), actor.up.remote, peer="ray:exposed"
    )


async def test_closing_ends_the_generator_and_what_it_served(exposed: Any) -> None:
    connection = await connected(exposed)
    stream = connection.open("wait")
    assert await anext(stream) == 1
    assert await exposed.left.remote() == (1, 1)
    await connection.aclose()
    while await exposed.left.remote() != (0, 0):
        pass


async def test_a_client_that_only_cancels_leaves_nothing_behind(exposed: Any) -> None:
    """Dropping Ray's generator would leave the actor's side running for ever."""
    connection = await connected(exposed)
    stream = connection.open("wait")
    assert await anext(stream) == 1
    await connection._wire.aclose()
    while await exposed.left.remote() != (0, 0):
        pass


async def test_an_actor_that_dies_ends_the_connection(exposed: Any) -> None:
    import ray

    connection = await connected(exposed)
    stream = connection.open("wait")
    assert await anext(stream) == 1
    ray.kill(exposed)
    with pytest.raises(ChannelLost, match="ray:exposed broke"):
        await anext(stream)
    await connection.wait_closed()


async def test_an_actor_that_cannot_answer_is_told_as_lost(ray_session: None, tmp_path: Path) -> None:
    import ray

    actor = ray.remote(Exposed).remote()
    ray.kill(actor)
    with pytest.raises(ChannelLost, match="ray:exposed can't be reached"):
        await connected(actor)
