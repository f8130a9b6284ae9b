"""Batches through a pool, and several pools behind one front; EchoEngine on LocalCluster."""

from __future__ import annotations

import contextlib

import anyio
import pytest

from actors import PoolFront
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from actors.pool import EnginePool
from arun import Failed, Ok, Policy, Retry, Runtime
from arun.errors import EngineError, MisuseError, PoolBusy, RequestError

pytestmark = pytest.mark.anyio


def echo(**options):
    return EngineSpec(model="echo", engine="echo", engine_args=options)


@contextlib.asynccontextmanager
async def open_pool(spec=None, **options):
    async with (
        Runtime(),
        LocalCluster(isolation="task", cpus=8) as cluster,
        EnginePool(cluster, spec or echo(), **options) as pool,
    ):
        yield pool


async def test_a_batch_gives_an_outcome_for_every_request():
    async with open_pool(echo(fail_on="poison"), replicas=2) as pool:
        prompts = ["a b", "poison", [1, 2], [{"role": "user", "content": "c d e"}]]
        outcomes = {}
        async for outcome in pool.map(prompts, max_tokens=2):
            request_id = outcome.value.request_id if isinstance(outcome, Ok) else outcome.error.request_id
            outcomes[int(request_id.rpartition("-")[2])] = outcome
    assert [outcomes[number].value.text for number in (0, 2, 3)] == ["a b", "1 2", "c d"]
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, RequestError)


async def test_a_batch_may_keep_the_order_of_its_requests():
    async with open_pool() as pool:
        policy = Policy(limit=8, order="submitted", on_error="collect")
        prompts = [" ".join(["w"] * (1 + number * 7 % 5)) for number in range(30)]
        assert [outcome.value.text async for outcome in pool.map(prompts, policy)] == prompts


async def test_requests_of_a_batch_may_have_arguments_of_their_own():
    async with open_pool() as pool:
        requests = [{"prompt": "a b c", "max_tokens": 1, "request_id": "mine"}, {"prompt": "d e f"}]
        policy = Policy(order="submitted")
        done = [outcome.value async for outcome in pool.map(requests, policy, max_tokens=2)]
    assert [(each.text, each.request_id[-2:]) for each in done] == [("a", "ne"), ("d e", "-1")]


async def test_a_batch_reads_an_endless_source_only_as_there_is_room_and_closes_it():
    read = 0
    closed = False

    async def prompts():
        nonlocal read, closed
        try:
            while True:
                read += 1
                yield f"prompt {read}"
        finally:
            closed = True

    async with open_pool(max_in_flight=4) as pool:
        answers = pool.map(prompts())
        async with contextlib.aclosing(answers):
            done = [await anext(answers) for _ in range(20)]
        assert {outcome.value.text for outcome in done} <= {f"prompt {number}" for number in range(1, 40)}
        assert read <= 20 + 2 * 4
        assert closed
        await pool.drain()
        assert pool.stats().in_flight == 0


async def test_a_batch_lets_interactive_requests_go_first():
    async with open_pool(echo(hang_on="tar"), max_in_flight=1) as pool:
        occupant = pool.generate("tar pit")
        batch = pool.map(["b"] * 50, Policy(limit=20))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, batch)
            await anyio.wait_all_tasks_blocked()
            assert pool.stats().waiting_batch == 20
            urgent = pool.generate("urgent")
            await occupant.aclose()
            assert urgent.replica == 0
            assert [delta.text async for delta in urgent] == ["urgent"]
        await batch.aclose()


async def test_a_busy_pool_may_be_asked_again_by_policy():
    async with open_pool(max_in_flight=1, max_waiting=0) as pool:
        retry = Retry(attempts=100, on=PoolBusy, initial=0.001, maximum=0.01)
        outcomes = [outcome async for outcome in pool.map(["a"] * 10, Policy(limit=4, retry=retry))]
        assert [outcome.value.text for outcome in outcomes] == ["a"] * 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["to be"], "was given a str, 'to be'; it takes many requests: pool.map"),
        ([{"prompt": "x"}], "was given a dict, .*; it takes many requests"),
        ([3], "was given an int, 3; it takes many requests"),
        ([["x"], 8], "was given the policy an int, 8; it takes a Policy"),
    ],
    ids=str,
)
async def test_what_is_no_batch_is_refused_by_the_call_itself(arguments, told):
    async with open_pool() as pool:
        with pytest.raises(MisuseError, match=told):
            pool.map(*arguments)


async def test_a_request_without_a_prompt_is_refused():
    async with open_pool() as pool:
        with pytest.raises(MisuseError, match="request 1 of this batch has no 'prompt'; it has text"):
            async for _ in pool.map([{"prompt": "a"}, {"text": "b"}]):
                pass


# -- several models ----------------------------------------------------------------------------------


async def test_a_front_sends_each_request_to_the_pool_of_its_model():
    async with Runtime(), LocalCluster(isolation="task", cpus=8) as cluster:
        large = EngineSpec(model="large", engine="echo", max_model_len=100)
        async with PoolFront({"small": cluster.engines(echo()), "large": cluster.engines(large, replicas=2)}) as front:
            assert front.models == ("small", "large")
            assert (await front.complete("a b", model="large")).text == "a b"
            assert [delta.text async for delta in front.generate("c")] == ["c"]
            stats = front.stats()
            finished = {model: sum(each.finished for each in pool.replicas) for model, pool in stats.items()}
            assert finished == {"small": 1, "large": 1}
            requests = [{"prompt": "x", "model": model} for model in ("small", "large", "large")]
            assert all([isinstance(outcome, Ok) async for outcome in front.map(requests)])
            with pytest.raises(RequestError, match="no model 'huge' here; there are 'small', 'large'"):
                front.generate("a", model="huge")
        assert cluster.list() == []


async def test_a_front_that_can_not_start_one_pool_closes_the_others():
    async with Runtime(), LocalCluster(isolation="task", cpus=8) as cluster:
        with pytest.raises(EngineError, match="out of memory"):
            async with PoolFront({
                "a": cluster.engines(echo()),
                "b": cluster.engines(echo(fail_start="out of memory")),
            }):
                pytest.fail("it must not open")
        assert cluster.list() == []


async def test_a_front_leaves_pools_open_that_were_open():
    async with open_pool() as pool:
        async with PoolFront({"a": pool}) as front:
            assert (await front.complete("x")).text == "x"
        assert (await pool.complete("y")).text == "y"
