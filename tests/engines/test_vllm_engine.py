"""EnginePool over real vLLM engines with the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal

import pytest

from actors.engine import EngineSpec, Usage
from actors.local_cluster import LocalCluster
from actors.models import tiny_model
from arun.errors import EngineDead, EngineError, MisuseError, ModelNotFound, RequestError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="session")]

MAX_MODEL_LEN = 512


@pytest.fixture
def pool(tiny_pool):
    return tiny_pool


async def engine_load(pool):
    [info] = await pool.info()
    return info.load


async def test_a_text_prompt_is_continued_token_by_token(pool):
    deltas = [delta async for delta in pool.generate("Nothing is left", max_tokens=8, temperature=0, ignore_eos=True)]
    assert sum(len(delta.token_ids) for delta in deltas) == 8
    assert len(deltas) > 1
    assert deltas[-1].finish_reason == "length"
    assert deltas[-1].usage.completion_tokens == 8
    assert all(delta.usage is None for delta in deltas[:-1])


async def test_a_completion_is_its_deltas_joined(pool):
    options = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    deltas = [delta async for delta in pool.generate("An engine turns", **options)]
    done = await pool.complete("An engine turns", **options)
    assert done.text == "".join(delta.text for delta in deltas)
    assert done.token_ids == [token for delta in deltas for token in delta.token_ids]
    assert done.usage == deltas[-1].usage
    assert 0 < done.time_to_first_token < 60


async def test_without_a_limit_an_answer_fills_the_context(pool):
    done = await pool.complete([5, 6, 7], max_tokens=None, temperature=0, ignore_eos=True)
    assert done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens + done.usage.completion_tokens == 512  # max_model_len


async def test_token_ids_are_a_prompt(pool):
    done = await pool.complete([5, 6, 7], max_tokens=4, temperature=0, ignore_eos=True)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (3, 4)


async def test_a_chat_goes_through_the_models_template(pool):
    done = await pool.complete([{"role": "user", "content": "a"}], max_tokens=4, ignore_eos=True)
    # <|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n is longer than the message's one token.
    assert done.usage.prompt_tokens > 6


async def test_a_seed_makes_sampling_repeatable(pool):
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    first, second = await pool.complete("a stream", **options), await pool.complete("a stream", **options)
    assert first.token_ids == second.token_ids


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(pool):
    options = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    whole = (await pool.complete("The runtime", **options)).text
    stop = whole[len(whole) // 2 :][:2]
    done = await pool.complete("The runtime", stop=stop, **options)
    assert done.finish_reason == "stop"
    assert done.text == whole[: whole.index(stop)]


async def test_leaving_a_stream_aborts_the_request_in_the_engine(pool):
    stream = pool.generate("a b c", max_tokens=400, ignore_eos=True)
    await anext(stream)
    await stream.aclose()
    assert (await engine_load(pool)).in_flight == 0
    assert (await pool.complete("again", max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2


async def test_a_cancel_at_any_moment_of_the_submission_leaves_no_request(pool):
    started = (await engine_load(pool)).started
    for steps in range(40):
        task = asyncio.create_task(pool.complete("a b c " * 20, max_tokens=300, ignore_eos=True))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    load = await engine_load(pool)
    assert load.in_flight == 0
    assert load.started > started


@pytest.mark.parametrize("prompt", ["word " * 2000, [5] * 600], ids=["text", "tokens"])
async def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(pool, prompt):
    with pytest.raises(RequestError, match=str(MAX_MODEL_LEN)):
        await pool.complete(prompt)
    assert pool.stats().replicas[0].state == "ready"


async def test_a_token_outside_the_vocabulary_is_refused(pool):
    with pytest.raises(RequestError, match="100000"):
        await pool.complete([100000])


async def test_64_requests_at_once_are_all_answered(pool):
    done = await asyncio.gather(
        *(
            pool.complete(
                f"request {number}", max_tokens=32, ignore_eos=True, lane="batch" if number % 2 else "interactive"
            )
            for number in range(64)
        )
    )
    assert [each.usage.completion_tokens for each in done] == [32] * 64
    assert (await engine_load(pool)).in_flight == 0


async def test_two_workers_share_a_model_and_end_with_a_killed_actor(descendants, shared_memory):
    before = shared_memory()
    async with LocalCluster(cpus=8) as cluster:
        spec = EngineSpec(model="tiny", max_model_len=256, tensor_parallel_size=2)
        async with cluster.engines(spec, name="pair", restarts=0) as pool:
            done = await pool.complete("Two workers", max_tokens=8, ignore_eos=True)
            assert done.usage.completion_tokens == 8
            pid = pool.stats().replicas[0].pid
            processes = descendants(pid)
            assert sum("Worker" in command for command in processes.commands.values()) == 2
            stream = pool.generate("Two workers", max_tokens=200, ignore_eos=True)
            await anext(stream)
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match=rf"no replica left. replica 0: .*pid {pid}"):
                async for _ in stream:
                    pass
            assert await asyncio.to_thread(processes.wait_gone, 10) == []
            assert shared_memory() == before


# Told to end by SIGTERM, EngineCore first aborts what runs, and says so as if that were complete.
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
async def test_an_answer_goes_on_when_its_engine_core_was_killed(descendants, shared_memory, sent):
    before = shared_memory()
    async with (
        LocalCluster(cpus=8) as cluster,
        cluster.engines(EngineSpec(model="tiny", max_model_len=256), name="solo") as pool,
    ):
        commands = descendants(pool.stats().replicas[0].pid).commands
        [core] = [pid for pid, command in commands.items() if "EngineCore" in command]
        stream = pool.generate([5], max_tokens=200, ignore_eos=True)  # one token: see VLLMEngine._warm_up
        deltas = [await anext(stream)]
        os.kill(core, sent)
        deltas += [delta async for delta in stream]
        assert sum(len(delta.token_ids) for delta in deltas) == 200
        assert deltas[-1].usage == Usage(1, 200)
        stats = pool.stats()
        assert (stats.restarts, stats.reroutes, stats.replicas[0].lost) == (1, 1, 1)
        assert "EngineCore" in stats.replicas[0].cause
    assert shared_memory() == before


async def test_all_that_a_replica_has_in_flight_is_in_one_batch():
    async with LocalCluster(cpus=8) as cluster, cluster.engines(EngineSpec(model="tiny", max_model_len=512)) as pool:
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(pool.complete("a b c", max_tokens=500, temperature=0, ignore_eos=True))
                for _ in range(300)
            ]
            largest = 0
            while largest < 256:  # of the 300; vLLM's own default is 128 on a CPU
                [metrics] = await pool.metrics()
                largest = max(largest, metrics.running)
            for task in asked:
                task.cancel()
        assert largest == 256


async def test_weights_that_are_missing_are_named_by_the_error(tmp_path):
    model = tmp_path / "hollow"
    shutil.copytree(tiny_model(), model)
    (model / "model.safetensors").unlink()
    async with LocalCluster(cpus=8) as cluster:
        with pytest.raises(EngineError) as caught:
            async with cluster.engines(EngineSpec(model=str(model), max_model_len=256)):
                pytest.fail("the pool must not open")
        assert cluster.list() == []
    assert str(model) in str(caught.value)
    assert "weights" in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_hub_that_cannot_be_reached_is_model_not_found():
    spec = EngineSpec(model="someone/nothing", env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"})
    async with LocalCluster(cpus=8) as cluster:
        with pytest.raises(ModelNotFound, match=r"'someone/nothing'.*couldn't connect.*Name a folder"):
            async with cluster.engines(spec):
                pytest.fail("the pool must not open")


async def test_an_unknown_engine_argument_is_refused():
    async with LocalCluster(cpus=8) as cluster:
        with pytest.raises(MisuseError, match="max_model_length"):
            async with cluster.engines(EngineSpec(model="tiny", engine_args={"max_model_length": 5})):
                pytest.fail("the pool must not open")


async def test_a_wrong_path_is_refused_before_any_process_starts(monkeypatch):
    async with LocalCluster(cpus=8) as cluster:
        monkeypatch.setattr(cluster, "spawn", None)
        with pytest.raises(ModelNotFound, match="'/no/such/model'"):
            async with cluster.engines(EngineSpec(model="/no/such/model")):
                pytest.fail("the pool must not open")
