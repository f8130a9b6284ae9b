"""EnginePool on LocalCluster, with EchoEngine: no model, real actors and real channels."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import os
import pickle

import anyio
import msgspec
import pytest

from actors.echo_engine import EchoEngine
from actors.engine import EngineSpec, Usage
from actors.local_cluster import LocalCluster
from actors.pool import EnginePool
from arun.errors import EngineError, MisuseError, PlacementError, RequestError
from arun.runtime import Runtime

pytestmark = pytest.mark.anyio

LONG = "word " * 10_000


def echo(max_model_len=None, **options):
    return EngineSpec(model="echo", engine="echo", max_model_len=max_model_len, engine_args=options)


@contextlib.asynccontextmanager
async def open_pool(spec=None, *, isolation="task", cpus=8, **options):
    async with (
        Runtime(),
        LocalCluster(isolation=isolation, cpus=cpus) as cluster,
        EnginePool(cluster, spec or echo(), **options) as pool,
    ):
        yield pool


async def engine_load(pool):
    [info] = await pool.info()
    return info.load


async def test_an_answer_streams_as_deltas():
    async with open_pool() as pool:
        deltas = [delta async for delta in pool.generate("to be or not", max_tokens=10)]
    assert [delta.text for delta in deltas] == ["to", " be", " or", " not"]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage == Usage(4, 4)
    assert all(delta.usage is None for delta in deltas[:-1])


async def test_a_completion_has_the_whole_answer():
    async with open_pool() as pool:
        done = await pool.complete([{"role": "user", "content": "to be"}], max_tokens=10, request_id="mine")
    assert (done.text, done.finish_reason, done.usage, done.request_id) == ("to be", "stop", Usage(2, 2), "mine")
    assert len(done.token_ids) == 2
    assert done.time_to_first_token is not None


async def test_requests_spread_over_the_replicas():
    async with open_pool(replicas=3) as pool:
        streams = [pool.generate("a b") for _ in range(6)]
        assert [stream.replica for stream in streams] == [0, 1, 2, 0, 1, 2]
        for stream in streams:
            assert [delta.text async for delta in stream] == ["a", " b"]
        stats = pool.stats()
    assert [(each.state, each.in_flight, each.finished, each.tokens) for each in stats.replicas] == [
        ("ready", 0, 2, 4),
    ] * 3


async def test_requests_beyond_the_limit_wait_in_order_of_arrival():
    async with open_pool(max_in_flight=1) as pool:
        first, second, third = (pool.generate("a b") for _ in range(3))
        assert (pool.stats().waiting, second.replica) == (2, None)
        assert [delta.text async for delta in first] == ["a", " b"]
        assert (pool.stats().waiting, second.replica, third.replica) == (1, 0, None)
        assert [delta.text async for delta in second] == ["a", " b"]
        assert [delta.text async for delta in third] == ["a", " b"]


async def test_a_waiting_request_that_is_closed_makes_way():
    async with open_pool(max_in_flight=1) as pool:
        first, second, third = (pool.generate("a b") for _ in range(3))
        await second.aclose()
        assert [delta async for delta in second] == []
        assert len([delta async for delta in first]) == 2
        assert len([delta async for delta in third]) == 2


async def test_closing_a_stream_aborts_its_request_before_it_returns():
    async with open_pool() as pool:
        stream = pool.generate(LONG, max_tokens=10_000)
        await anext(stream)
        await stream.aclose()
        load = await engine_load(pool)
        assert (load.in_flight, load.aborted) == (0, 1)
        assert pool.stats().replicas[0].aborted == 1
        assert [delta async for delta in stream] == []


async def test_cancelling_the_consumer_aborts_its_request():
    async def consume(pool, started):
        async for _ in pool.generate(LONG, max_tokens=10_000):
            started.set()

    async with open_pool() as pool:
        started = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, pool, started)
            await started.wait()
            tasks.cancel_scope.cancel()
        load = await engine_load(pool)
        assert (load.in_flight, load.aborted) == (0, 1)


async def test_a_cancelled_complete_aborts_a_request_that_hangs():
    async with open_pool(echo(hang_on="tar")) as pool:
        with anyio.move_on_after(0.05) as scope:
            await pool.complete("tar pit")
        assert scope.cancelled_caught
        load = await engine_load(pool)
        assert (load.in_flight, load.aborted) == (0, 1)


async def test_a_dropped_stream_aborts_its_request_also_from_another_thread():
    async with open_pool(echo(hang_on="tar"), max_in_flight=1) as pool:
        streams = [pool.generate("tar pit")]
        waiting = pool.generate("water")

        def drop():
            streams.clear()
            gc.collect()

        await anyio.to_thread.run_sync(drop)
        assert [delta.text async for delta in waiting] == ["water"]
        assert pool.stats().replicas[0].aborted == 1


async def test_a_refused_request_raises_request_error_and_the_replica_goes_on():
    async with open_pool(echo(fail_on="poison", max_model_len=4)) as pool:
        with pytest.raises(RequestError, match="poison"):
            await pool.complete("poison")
        with pytest.raises(RequestError, match="5 tokens"):
            await pool.complete("a b c d e")
        assert (await pool.complete("water")).text == "water"
        assert (pool.stats().replicas[0].failed, pool.stats().replicas[0].state) == (2, "ready")


async def test_an_unknown_parameter_is_refused_by_the_call_itself():
    async with open_pool() as pool:
        with pytest.raises(RequestError, match="did you mean 'frequency_penalty'"):
            pool.generate("a", frequency_penality=1.0)
        assert pool.stats().replicas[0].started == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lane": "fast"}, "lane='fast': it must be 'interactive' or 'batch'"),
        ({"priority": "high"}, "priority='high': it must be a whole number"),
        ({"reroute": "always"}, "reroute='always': it must be 'continue', 'restart' or 'never'"),
        ({"request_id": 3}, "request_id=3: it must be text"),
        ({"seed": 2**70}, r"Expected `int` <= 9223372036854775807 - at `\$\.seed`"),
        ({"prompt": "\ud800"}, "the prompt is no valid text: .*surrogates not allowed"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "the prompt is no valid text: .*surrogates not allowed"),
    ],
    ids=str,
)
async def test_what_no_engine_could_go_by_is_refused_by_the_call_itself(options, told):
    async with open_pool() as pool:
        with pytest.raises(RequestError, match=told):
            pool.generate(**{"prompt": "a", **options})
        assert pool.stats().replicas[0].started == 0


async def test_what_can_not_be_sent_is_the_fault_of_the_request():
    async with open_pool() as pool:
        with pytest.raises(RequestError, match=r"request 'x' can't be sent to an engine: .*surrogates not allowed"):
            await pool.complete("a", stop=["\ud800"], request_id="x")
        assert (await pool.complete("a")).text == "a"


async def test_an_unknown_parameter_is_told_each_known_one_once():
    async with open_pool() as pool:
        with pytest.raises(RequestError, match="there is no sampling parameter 'zzz'; known are") as caught:
            pool.generate("a", zzz=1)
    known = str(caught.value).partition("known are ")[2].split(", ")
    assert len(known) == len(set(known))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("use", ["complete", "map", "aclose", "without a loop"])
async def test_another_thread_is_refused_and_the_pool_goes_on(use):
    async with open_pool() as pool:

        async def used():
            match use:
                case "complete":
                    await pool.complete("a")
                case "map":
                    async for outcome in pool.map(["a"]):
                        raise outcome.error
                case _:
                    await pool.aclose()

        call = (
            functools.partial(pool.generate, "a") if use == "without a loop" else functools.partial(asyncio.run, used())
        )
        with pytest.raises(MisuseError, match="was opened on another event loop or thread, the only one that can use"):
            await anyio.to_thread.run_sync(call)
        assert (await pool.complete("a")).text == "a"


async def test_two_pools_of_one_cluster_have_two_names():
    async with Runtime(), LocalCluster(isolation="task", cpus=8) as cluster, cluster.engines(echo(), name="chat"):
        with pytest.raises(MisuseError, match="this cluster has a pool named 'chat' already; give one of the two"):
            await cluster.engines(echo(), name="chat").start()


async def test_a_request_id_can_not_be_in_flight_twice():
    async with open_pool() as pool:
        stream = pool.generate("a", request_id="x")
        with pytest.raises(RequestError, match="'x'"):
            pool.generate("a", request_id="x")
        await stream.aclose()
        assert (await pool.complete("a", request_id="x")).text == "a"


async def test_closing_the_pool_fails_what_is_in_flight():
    async with open_pool(echo(hang_on="tar"), max_in_flight=1) as pool:
        streams = [pool.generate("tar pit"), pool.generate("water")]

        async def consume(stream):
            with pytest.raises(EngineError, match="was closed before the answer was complete"):
                async for _ in stream:
                    pass

        async with anyio.create_task_group() as tasks:
            for stream in streams:
                tasks.start_soon(consume, stream)
            await anyio.wait_all_tasks_blocked()
            await pool.aclose()
        with pytest.raises(MisuseError, match="not open"):
            pool.generate("a")


async def test_closing_releases_everything_and_may_be_repeated():
    async with Runtime(), LocalCluster(isolation="task", cpus=2) as cluster:
        async with cluster.engines(echo(), replicas=2) as pool:
            assert (await cluster.resources()).cpus_free == 0
        await pool.aclose()
        assert (await cluster.resources()).cpus_free == 2
        assert cluster.list() == []


async def test_a_start_that_fails_releases_everything_and_raises_the_cause():
    async with Runtime(), LocalCluster(isolation="task", cpus=2) as cluster:
        with pytest.raises(EngineError) as caught:
            async with cluster.engines(echo(fail_start="out of memory"), replicas=2):
                pytest.fail("the pool must not open")
        assert str(caught.value) == "out of memory"
        assert (await cluster.resources()).cpus_free == 2
        assert cluster.list() == []


async def test_a_start_that_is_cancelled_releases_everything():
    async with Runtime(), LocalCluster(isolation="task", cpus=2) as cluster:
        with anyio.move_on_after(0.05):
            async with cluster.engines(echo(start_seconds=3600), replicas=2):
                pytest.fail("the pool must not open")
        assert (await cluster.resources()).cpus_free == 2
        assert cluster.list() == []


async def test_too_many_replicas_are_refused_with_the_numbers():
    async with Runtime(), LocalCluster(isolation="task", cpus=2) as cluster:
        with pytest.raises(PlacementError, match="room for 2 of 3"):
            async with cluster.engines(echo(), replicas=3):
                pytest.fail("the pool must not open")


async def test_progress_is_told_while_replicas_start():
    told = []
    async with open_pool(replicas=2, on_progress=told.append):
        pass
    assert sorted((progress.replica, progress.state) for progress in told) == [
        (0, "loading model"),
        (0, "ready"),
        (0, "reserving bundles"),
        (1, "loading model"),
        (1, "ready"),
        (1, "reserving bundles"),
    ]
    assert all(progress.seconds >= 0 for progress in told)


async def test_a_pool_refuses_to_be_pickled_and_to_be_used_before_its_start():
    async with Runtime(), LocalCluster(isolation="task") as cluster:
        pool = cluster.engines(echo(), name="chat")
        with pytest.raises(MisuseError, match="'chat' can't be pickled"):
            pickle.dumps(pool)
        with pytest.raises(MisuseError, match="not open"):
            pool.generate("a")


class Shouting(EchoEngine):
    """An engine of a user's own."""

    async def generate(self, request):
        deltas = super().generate(request)
        try:
            async for delta in deltas:
                yield msgspec.structs.replace(delta, text=delta.text.upper())
        finally:
            await deltas.aclose()


@pytest.mark.parametrize(
    ("isolation", "anyio_backend"), [("process", "asyncio"), ("task", "asyncio"), ("task", "trio")]
)
async def test_an_engine_may_be_a_class_of_the_users_own(isolation):
    async with open_pool(EngineSpec(model="echo", engine=Shouting), isolation=isolation) as pool:
        assert (await pool.complete("to be")).text == "TO BE"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_process_per_replica_and_none_is_left():
    async with open_pool(isolation="process", replicas=2) as pool:
        pids = {each.pid for each in pool.stats().replicas}
        assert len(pids) == 2
        done = [await pool.complete("a b c", max_tokens=2) for _ in range(4)]
        assert {each.text for each in done} == {"a b"}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"replicas": 0}, "replicas is 0; it must be at least 1"),
        ({"restarts": "3"}, "restarts='3' .* it must be a whole number"),
        ({"replicas": "2"}, "replicas is '2'; it must be a whole number"),
        ({"max_in_flight": 1001}, "max_in_flight is 1001; one replica takes at most 1000"),
        ({"watchdog": 0}, "both are seconds above 0"),
        ({"lifetime": "forever"}, "must be 'scope' or 'detached'"),
        ({"get_if_exists": True}, "needs lifetime='detached'"),
        ({"lifetime": "detached"}, "needs name="),
    ],
    ids=str,
)
async def test_impossible_options_are_refused_where_they_are_written(options, told):
    with pytest.raises(MisuseError, match=told):
        EnginePool(LocalCluster(isolation="task"), echo(), **options)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"model": 3, "engine": "echo"}, "model is 3; it must be text"),
        ({"model": "x", "engine": int}, r"int has no generate\(\), so it is no engine"),
    ],
    ids=str,
)
async def test_what_is_no_engine_is_refused_where_it_is_written(spec, told):
    with pytest.raises(MisuseError, match=told):
        LocalCluster(isolation="task").engines(EngineSpec(**spec))
