"""What a pool takes by name beside sampling: several answers, embeddings, metrics; with EchoEngine."""

from __future__ import annotations

import contextlib

import pytest

from actors.engine import EngineSpec, Usage
from actors.local_cluster import LocalCluster
from arun.errors import EngineError, RequestError
from arun.runtime import Runtime

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def open_pool(**spec):
    async with (
        Runtime(),
        LocalCluster(isolation="task") as cluster,
        cluster.engines(EngineSpec(model="echo", engine="echo", **spec)) as pool,
    ):
        yield pool


async def test_several_answers_to_one_prompt():
    async with open_pool() as pool:
        deltas = [delta async for delta in pool.generate("to be", n=3)]
        done = await pool.complete("to be", n=3)
    assert [(delta.text, delta.index) for delta in deltas] == [
        ("to", 0), ("to", 1), ("to", 2), (" be", 0), (" be", 1), (" be", 2),
    ]  # fmt: skip
    assert [delta.usage for delta in deltas] == [None] * 5 + [Usage(2, 6)]
    assert [(choice.index, choice.text, choice.finish_reason) for choice in done.choices] == [
        (index, "to be", "stop") for index in range(3)
    ]


async def test_embeddings_are_equal_for_equal_texts_and_have_length_one():
    async with open_pool(runner="pooling") as pool:
        first, again = await pool.embed("to be or not"), await pool.embed("to be or not")
        other = await pool.embed([1, 2, 3], dimensions=4, normalize=False)
    assert first.vector == again.vector
    assert sum(x * x for x in first.vector) == pytest.approx(1)
    assert first.prompt_tokens == 4
    assert len(other.vector) == 4
    assert sum(other.vector) == 3


async def test_a_pool_that_embeds_does_not_generate_and_the_other_way_round():
    async with open_pool(runner="pooling") as pool:
        with pytest.raises(RequestError, match=r"call pool\.embed"):
            pool.generate("to be")
        with pytest.raises(RequestError, match="dimensions"):
            await pool.embed("to be", dimensions=0)
    async with open_pool() as pool:
        with pytest.raises(RequestError, match="runner='pooling'"):
            await pool.embed("to be")


@pytest.mark.parametrize(
    "options",
    [{"logprobs": 1}, {"structured_outputs": {"regex": "a"}}, {"adapter": "x"}, {"tools": [{}]}, {"bad_words": ["a"]}],
)
async def test_what_needs_a_model_is_refused_by_name(options):
    async with open_pool() as pool:
        with pytest.raises(RequestError, match=next(iter(options))):
            await pool.complete([{"role": "user", "content": "to be"}], **options)
        assert (await pool.complete("to be")).text == "to be"


async def test_a_prompt_that_is_json_is_repeated_as_json():
    async with open_pool() as pool:
        assert (await pool.complete('{"a": 1}', structured_outputs={"json_object": True})).text == '{"a": 1}'
        with pytest.raises(RequestError, match="a prompt that is no JSON for it to repeat"):
            await pool.complete("to be", structured_outputs={"json_object": True})


async def test_metrics_count_tokens_and_what_the_engine_lacks_is_named():
    async with open_pool() as pool:
        await pool.complete("to be or", n=2)
        [metrics] = await pool.metrics()
        assert (metrics.running, metrics.completion_tokens) == (0, 6)
        with pytest.raises(EngineError, match=r"EchoEngine has no sleep\(\)"):
            await pool.sleep()
