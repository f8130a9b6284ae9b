"""An engine that embeds: vLLM's pooling runner with the tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import math

import pytest
import pytest_asyncio

from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from arun.errors import RequestError

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool():
    spec = EngineSpec(
        model="tiny",
        runner="pooling",
        max_model_len=256,
        engine_args={"hf_overrides": {"is_matryoshka": True, "matryoshka_dimensions": [32, 64]}},
    )
    async with LocalCluster(cpus=8) as cluster, cluster.engines(spec, name="vectors") as pool:
        yield pool


async def test_equal_texts_have_equal_vectors_of_length_one(pool):
    first, again, other = await asyncio.gather(*map(pool.embed, ["the runtime", "the runtime", "a stream"]))
    assert len(first.vector) == 128
    assert math.hypot(*first.vector) == pytest.approx(1, abs=1e-3)
    assert math.dist(first.vector, again.vector) < 0.05
    assert math.dist(first.vector, other.vector) > 0.1
    assert first.prompt_tokens > 1


async def test_dimensions_and_length_are_as_asked_for(pool):
    short = await pool.embed([5, 6, 7], dimensions=32)
    assert len(short.vector) == 32
    assert math.hypot(*short.vector) == pytest.approx(1, abs=1e-3)
    assert math.hypot(*(await pool.embed([5, 6, 7], normalize=False)).vector) > 2


async def test_a_chat_is_embedded_through_its_template(pool):
    assert (await pool.embed([{"role": "user", "content": "a"}])).prompt_tokens > 6


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [([5] * 600, {}, "256"), ("a", {"dimensions": 33}, "33"), ([100000], {}, "100000")],
    ids=["too long", "dimensions", "vocabulary"],
)
async def test_a_bad_request_is_refused_with_the_numbers_and_the_engine_goes_on(pool, prompt, options, message):
    with pytest.raises(RequestError, match=message):
        await pool.embed(prompt, **options)
    assert len((await pool.embed("a")).vector) == 128


async def test_a_cancel_at_any_moment_leaves_no_request(pool):
    for steps in range(0, 60, 3):
        task = asyncio.create_task(pool.embed("a b c " * 20))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    [info] = await pool.info()
    assert info.load.in_flight == 0
