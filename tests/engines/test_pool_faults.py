"""What becomes of requests and replicas when something goes wrong; EchoEngine on LocalCluster."""

from __future__ import annotations

import contextlib
import os
import signal

import anyio
import msgspec
import pytest

from actors import Reset
from actors.echo_engine import EchoEngine
from actors.engine import EngineSpec, Usage
from actors.local_cluster import LocalCluster
from actors.members.supervision import Backoff, Supervisor
from actors.pool import EnginePool
from arun.errors import EngineDead, PlacementError, PoolBusy, ReplicaLost, RequestQuarantined
from arun.runtime import Runtime
from tests.faults.nemesis import cut

pytestmark = pytest.mark.anyio

AT_ONCE = Supervisor(intensity=100, backoff=Backoff(first=0, cap=0))
WORDS = " ".join(f"w{number}" for number in range(40))


def echo(**options):
    return EngineSpec(model="echo", engine="echo", engine_args=options)


@contextlib.asynccontextmanager
async def open_pool(spec=None, *, isolation="task", **options):
    async with (
        Runtime(),
        LocalCluster(isolation=isolation, cpus=8, grace=1) as cluster,
        EnginePool(cluster, spec or echo(), **{"restarts": AT_ONCE, **options}) as pool,
    ):
        yield pool


async def states(pool, wanted):
    """Wait until the replicas are in these states."""
    while [each.state for each in pool.stats().replicas] != wanted:
        changed = anyio.Event()
        pool.on_progress = lambda progress, changed=changed: changed.set()
        await changed.wait()


async def read(stream):
    return [delta async for delta in stream]


def text(deltas):
    return "".join(delta.text for delta in deltas)


@contextlib.asynccontextmanager
async def open_pool_that_may_be_cut(spec, **options):
    """Gives also what cuts the connection to its first replica."""
    async with Runtime(), LocalCluster(cpus=8, grace=1) as cluster:
        async with EnginePool(cluster, spec, name="chat", restarts=AT_ONCE, **options) as pool:
            yield pool, lambda: cut(cluster.list()[0].address)


# -- continuing --------------------------------------------------------------------------------------


async def test_an_answer_goes_on_at_another_replica_after_the_last_token_that_was_delivered():
    async with open_pool(echo(die_after=3), replicas=2) as pool:
        stream = pool.generate("a b c d e", max_tokens=10)
        deltas = await read(stream)
        assert [delta.text for delta in deltas] == ["a", " b", " c", " d", " e"]
        assert (deltas[-1].finish_reason, deltas[-1].usage) == ("stop", Usage(5, 5))
        assert stream.replica == 1
        stats = pool.stats()
        assert (stats.reroutes, stats.dead_letters, stats.quarantined) == (1, 0, 0)
        assert (stats.replicas[0].lost, stats.replicas[0].tokens, stats.replicas[1].tokens) == (1, 3, 2)
        await states(pool, ["ready", "ready"])
        assert pool.stats().replicas[0].restarts == pool.stats().restarts == 1


async def test_most_tokens_are_counted_over_all_replicas():
    async with open_pool(echo(die_after=3)) as pool:
        deltas = await read(pool.generate(WORDS, max_tokens=5, ignore_eos=True))
    assert (text(deltas), deltas[-1].finish_reason, deltas[-1].usage) == ("w0 w1 w2 w3 w4", "length", Usage(40, 5))
    assert len(deltas) == 5


async def test_an_answer_that_may_fill_the_context_goes_on_until_it_is_full():
    async with open_pool(msgspec.structs.replace(echo(die_after=3), max_model_len=45)) as pool:
        deltas = await read(pool.generate(WORDS, max_tokens=None, ignore_eos=True))
    assert (text(deltas), deltas[-1].finish_reason, deltas[-1].usage) == ("w0 w1 w2 w3 w4", "length", Usage(40, 5))


async def test_a_waiting_request_outlives_the_only_replica():
    async with open_pool(echo(die_after=3), max_in_flight=1) as pool:
        streams = [pool.generate("a b c d", max_tokens=8), pool.generate("e f", max_tokens=8)]
        assert [text(await read(stream)) for stream in streams] == ["a b c d", "e f"]


async def test_answers_go_on_over_another_connection_to_the_same_replica():
    async with open_pool_that_may_be_cut(echo(token_seconds=0.01)) as (pool, cut_it):
        pid = pool.stats().replicas[0].pid
        stream = pool.generate(WORDS, max_tokens=40)
        deltas = [await anext(stream)]
        cut_it()
        deltas += await read(stream)
        assert (text(deltas), deltas[-1].usage) == (WORDS, Usage(40, 40))
        for option, asked in ({"reroute": "never"}, "reroute='never'"), ({"seed": 1}, "seed"):
            stream = pool.generate(WORDS, max_tokens=40, **option)
            await anext(stream)
            cut_it()
            with pytest.raises(ReplicaLost, match=rf"replica 0 of pool 'chat'.*{asked}"):
                await read(stream)
        stats = pool.stats()
        assert (stats.reroutes, stats.restarts, stats.quarantined, stats.replicas[0].lost) == (1, 0, 0, 3)
        assert (stats.replicas[0].pid, stats.replicas[0].state) == (pid, "ready")


class Shy(EchoEngine):
    """Its first health check has no end; its load tells how many there were."""

    checks = 0

    async def check_health(self):
        self.checks += 1
        if self.checks == 1:
            await anyio.sleep_forever()

    def load(self):
        return msgspec.structs.replace(super().load(), failed=self.checks)


async def test_a_connection_that_breaks_before_the_first_sign_of_life_is_no_loss():
    async with open_pool_that_may_be_cut(EngineSpec(model="echo", engine=Shy)) as (pool, cut_it):
        for checks in 1, 2:
            while [info.load.failed for info in await pool.info()] != [checks]:
                pass
            if checks == 1:
                cut_it()
        assert (await pool.complete("a b")).text == "a b"
        assert pool.stats().restarts == 0


async def test_a_request_under_which_one_connection_after_the_other_breaks_is_given_up():
    async with open_pool_that_may_be_cut(echo(hang_on="silence")) as (pool, cut_it):
        async with anyio.create_task_group() as tasks:

            @tasks.start_soon
            async def read_it():
                with pytest.raises(ReplicaLost, match="lost its connection 5 times without a delta in between"):
                    await read(pool.generate("silence", max_tokens=1))

            for cuts in range(5):
                while [info.load.in_flight for info in await pool.info()] != [1] or pool.stats().reroutes != cuts:
                    pass
                cut_it()
        assert (await pool.complete("a b")).text == "a b"
        assert pool.stats().restarts == 0


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 1), ("n", 2), ("stop", ["zz"]), ("presence_penalty", 0.5), ("repetition_penalty", 2)]
)
async def test_what_can_not_be_continued_fails_once_a_delta_is_out(option, value):
    lost = rf"replica 0 of pool 'chat' .* 2 tokens of request 'mine' were delivered.*{option}"
    async with open_pool(echo(die_after=2), replicas=2, name="chat") as pool:
        with pytest.raises(ReplicaLost, match=lost):
            await read(pool.generate("a b c d e", max_tokens=10, request_id="mine", **{option: value}))
        assert (pool.stats().replicas[0].lost, pool.stats().replicas[0].failed) == (1, 0)


async def test_what_asked_for_it_begins_anew_and_is_told():
    async with open_pool(echo(die_after=3)) as pool:
        assert (await pool.complete("x")).text == "x"
        deltas = await read(pool.generate("a b c", seed=1, reroute="restart"))
    assert [delta.text for delta in deltas] == ["a", " b", "", "a", " b", " c"]
    assert isinstance(deltas[2], Reset)
    assert deltas[2].attempt == 2
    assert deltas[-1].usage == Usage(3, 3)


async def test_a_completion_begins_anew_by_itself():
    async with open_pool(echo(die_after=12), replicas=1) as pool:
        for _ in range(4):
            done = await pool.complete("a b c d e f g", max_tokens=10, seed=3)
            assert (done.text, done.usage) == ("a b c d e f g", Usage(7, 7))
        assert pool.stats().reroutes == 3


async def test_what_wants_one_replica_only_fails_with_it():
    async with open_pool(echo(die_on="poison"), replicas=2) as pool:
        with pytest.raises(ReplicaLost, match="reroute='never'"):
            await read(pool.generate("poison", reroute="never"))
        assert pool.stats().reroutes == 0


# -- quarantine, budget, admission -----------------------------------------------------------------------


async def test_a_request_that_kills_replicas_is_quarantined_and_its_neighbours_are_not():
    async with open_pool(echo(die_on="poison", first_token_seconds=0.02), replicas=2) as pool:
        results = {}

        async def ask(name, prompt):
            try:
                results[name] = (await pool.complete(prompt, max_tokens=64)).text
            except RequestQuarantined as exc:
                results[name] = exc

        async with anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(ask, number, WORDS)
            tasks.start_soon(ask, "bad", "poison")
        bad = results.pop("bad")
        assert set(results.values()) == {WORDS}
        assert "replicas of pool" in str(bad)
        assert "while it ran nothing else" in str(bad)
        assert pool.stats().quarantined == 1


async def test_a_replica_that_dies_too_often_is_given_up_and_scale_replaces_it():
    async with open_pool(echo(die_on="poison"), restarts=0, name="chat") as pool:
        with pytest.raises(
            EngineDead, match=r"'chat' has no replica left. replica 0: .*poison.*it is not started again"
        ):
            await pool.complete("poison")
        await states(pool, ["dead"])
        with pytest.raises(EngineDead, match="no replica left"):
            await pool.complete("water")
        await pool.scale(1)
        assert (await pool.complete("water")).text == "water"


async def test_more_than_max_waiting_are_refused():
    async with open_pool(max_in_flight=1, max_waiting=1) as pool:
        streams = [pool.generate("a"), pool.generate("b")]
        with pytest.raises(PoolBusy, match="1 requests wait already, 1 are in flight"):
            pool.generate("c")
        assert (pool.stats().waiting_interactive, pool.stats().waiting_batch) == (1, 0)
        for stream in streams:
            await read(stream)
        assert (await pool.complete("c")).text == "c"


async def test_interactive_requests_go_before_batch_ones():
    async with open_pool(max_in_flight=1) as pool:
        first, batch, urgent = (
            pool.generate("a"),
            pool.generate("b", lane="batch"),
            pool.generate("c"),
        )
        await read(first)
        assert (urgent.replica, batch.replica) == (0, None)
        await read(urgent)
        assert batch.replica == 0
        await read(batch)


# -- hanging -----------------------------------------------------------------------------------------


async def test_a_replica_that_hangs_is_replaced_and_its_requests_go_on():
    async with open_pool(echo(hang_on="tar"), watchdog=0.2, quarantine=1) as pool:
        with pytest.raises(RequestQuarantined, match="it sent nothing for"):
            await pool.complete("tar pit")
        assert (await pool.complete("water")).text == "water"
        assert pool.stats().restarts == 1


async def test_a_slow_consumer_is_no_hanging_replica():
    async with open_pool(echo(hang_on="tar"), watchdog=0.1) as pool:
        stream = pool.generate(WORDS, max_tokens=64)
        await anext(stream)
        await anyio.sleep(0.5)
        assert len(await read(stream)) == 39
        assert pool.stats().restarts == 0


async def test_an_engine_at_work_on_an_answer_that_comes_whole_does_not_hang():
    async with open_pool(echo(token_seconds=0.05), watchdog=0.4) as pool:
        done = await pool.complete(WORDS, max_tokens=40)
        assert done.usage.completion_tokens == 40
        assert pool.stats().restarts == 0


# -- drain and scale ---------------------------------------------------------------------------------


async def test_a_drained_replica_ends_its_requests_and_gives_its_bundles_back():
    async with (
        Runtime(),
        LocalCluster(isolation="task", cpus=2) as cluster,
        cluster.engines(echo(), replicas=2) as pool,
    ):
        streams = [pool.generate("a b") for _ in range(2)]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.drain, 0)
            await anyio.wait_all_tasks_blocked()
            assert pool.stats().replicas[0].state == "draining"
            assert pool.generate("c").replica == 1
            for stream in streams:
                assert text(await read(stream)) == "a b"
        assert [each.replica for each in pool.stats().replicas] == [1]
        assert (await cluster.resources()).cpus_free == 1
        assert [info.name.rpartition("-")[2] for info in cluster.list()] == ["1"]


async def test_a_replica_that_is_drained_while_it_is_stopped_for_a_restart_gives_its_bundles_back():
    async with (
        Runtime(),
        LocalCluster(isolation="task", cpus=2) as cluster,
        cluster.engines(echo(die_on="poison"), replicas=2) as pool,
    ):
        with pytest.raises(ReplicaLost):
            await read(pool.generate("poison", reroute="never"))
        assert sorted(each.state for each in pool.stats().replicas) == ["ready", "restarting"]
        lost = next(each.replica for each in pool.stats().replicas if each.state == "restarting")
        await pool.drain(lost)
        assert [each.state for each in pool.stats().replicas] == ["ready"]
        assert (await cluster.resources()).cpus_free == 1


async def test_a_pool_scales_while_requests_run():
    async with Runtime(), LocalCluster(isolation="task", cpus=3) as cluster, cluster.engines(echo()) as pool:
        stream = pool.generate("a b c")
        await pool.scale(3)
        assert [each.state for each in pool.stats().replicas] == ["ready"] * 3
        assert {pool.generate("x").replica for _ in range(2)} == {1, 2}
        await pool.scale(1)
        assert text(await read(stream)) == "a b c"
        await states(pool, ["ready"])
        assert (await cluster.resources()).cpus_free == 2


async def test_scaling_beyond_the_cluster_is_refused_and_nothing_changes():
    async with Runtime(), LocalCluster(isolation="task", cpus=2) as cluster, cluster.engines(echo()) as pool:
        with pytest.raises(Exception, match="room for 2 of 3"):
            await pool.scale(3)
        assert [each.state for each in pool.stats().replicas] == ["ready"]


async def test_scaling_into_what_others_have_is_refused_and_nothing_changes():
    async with Runtime(), LocalCluster(isolation="task", cpus=3) as cluster, cluster.engines(echo(), name="a") as pool:
        async with cluster.engines(echo(), name="b"):
            with pytest.raises(PlacementError, match="0 of 3 CPU free"):
                await pool.scale(3)
            assert [each.state for each in pool.stats().replicas] == ["ready"]
            assert (await cluster.resources()).cpus_free == 1
        await pool.scale(3)
        assert [each.state for each in pool.stats().replicas] == ["ready"] * 3


async def test_a_draining_pool_ends_what_runs_and_takes_no_more():
    async with open_pool(max_in_flight=1) as pool:
        streams = [pool.generate("a b"), pool.generate("c")]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pool.drain)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(Exception, match="draining"):
                pool.generate("d")
            assert [text(await read(stream)) for stream in streams] == ["a b", "c"]


async def test_several_pools_side_by_side():
    async with Runtime(), LocalCluster(isolation="task", cpus=4) as cluster:
        async with cluster.engines(echo(), replicas=2, name="one") as one, cluster.engines(echo(), name="two") as two:
            assert (await one.complete("a")).text == "a"
            assert (await two.complete("b")).text == "b"
            assert {info.name for info in cluster.list()} == {"one-0", "one-1", "two-0"}
        assert cluster.list() == []


# -- processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_killed_and_stopped_processes_cost_no_token():
    spec = echo(token_seconds=0.002)
    async with open_pool(spec, isolation="process", replicas=2, name="chat", watchdog=1.0) as pool:
        texts = []
        enough = anyio.Event()
        delivered = 0

        async def ask(number):
            nonlocal delivered
            deltas = []
            async for delta in pool.generate(f"q{number} {WORDS}", max_tokens=64):
                deltas.append(delta)
                delivered += 1
                if delivered == 100:
                    enough.set()
            assert deltas[-1].usage == Usage(41, 41)
            assert sum(len(delta.token_ids) for delta in deltas) == 41
            texts.append(text(deltas))

        async with anyio.create_task_group() as tasks:
            for number in range(16):
                tasks.start_soon(ask, number)
            await enough.wait()
            first, second = (each.pid for each in pool.stats().replicas)
            os.kill(first, signal.SIGKILL)
            os.kill(second, signal.SIGSTOP)
        assert sorted(texts) == sorted(f"q{number} {WORDS}" for number in range(16))
        await states(pool, ["ready", "ready"])
        stats = pool.stats()
        assert {each.pid for each in stats.replicas}.isdisjoint({first, second})
        assert [each.restarts for each in stats.replicas] == [1, 1]
        assert "SIGKILL" in stats.replicas[0].cause
    for pid in (first, second):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_idle_replica_that_dies_is_started_again_before_anybody_asks():
    async with open_pool(isolation="process") as pool:
        pid = pool.stats().replicas[0].pid
        seen = []
        ready = anyio.Event()

        def note(progress):
            seen.append(progress.state)
            if progress.state == "ready":
                ready.set()

        pool.on_progress = note
        os.kill(pid, signal.SIGKILL)
        await ready.wait()
        assert seen == ["restarting", "loading model", "ready"]
        assert pool.stats().replicas[0].pid != pid
