"""OpenAI's API over a pool, judged by OpenAI's own client and its types."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import pytest
import pytest_asyncio

from actors import EnginePool, EngineSpec, LocalCluster
from arun.web.openai import openai_app
from tests.web.conftest import Serve
from tests.web.samples import Breaking, Talker

if TYPE_CHECKING:
    import openai

pytestmark = pytest.mark.asyncio

SLOW = {"token_seconds": 1000.0, "fail_on": "poison", "die_on": "lethal"}
HELLO: Any = [{"role": "user", "content": "to be or not"}]


@pytest_asyncio.fixture
async def pools() -> AsyncIterator[dict[str, EnginePool]]:
    async with LocalCluster(isolation="task", cpus=8) as cluster:
        echo = cluster.engines(EngineSpec(model="echo", engine="echo"), max_in_flight=2, max_waiting=0)
        slow = EngineSpec(model="echo", engine="echo", engine_args=SLOW)
        pools = {
            "echo": echo,
            "slow": cluster.engines(slow, watchdog=5000.0),
            "talker": cluster.engines(EngineSpec(model="t", engine=Talker)),
            "breaking": cluster.engines(EngineSpec(model="b", engine=Breaking)),
            "vectors": cluster.engines(EngineSpec(model="echo", engine="echo", runner="pooling")),
        }
        for pool in pools.values():
            await pool.start()
        yield pools
        for pool in pools.values():
            await pool.aclose()


@pytest_asyncio.fixture
async def http(serve: Serve, pools: dict[str, EnginePool]) -> httpx2.AsyncClient:
    return await serve(openai_app(pools))


@pytest_asyncio.fixture
async def client(http: httpx2.AsyncClient) -> AsyncIterator[openai.AsyncOpenAI]:
    import openai  # not at the top: it takes every process that collects the tests most of a second

    async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_models_are_listed_and_told(client: openai.AsyncOpenAI) -> None:
    import openai

    listed = [model async for model in client.models.list()]
    assert [model.id for model in listed] == ["echo", "slow", "talker", "breaking", "vectors"]
    assert (await client.models.retrieve("echo")).object == "model"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here; there are 'echo'"):
        await client.models.retrieve("other")


async def test_a_chat_is_answered(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="echo", messages=HELLO, max_tokens=3, user="somebody")
    assert answer.choices[0].message.content == "to be or"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 3, 7)


async def test_a_chat_may_come_in_parts_and_without_a_limit(client: openai.AsyncOpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "a " * 20}, {"type": "text", "text": "b"}]}]
    answer = await client.chat.completions.create(model="echo", messages=parts)
    assert answer.choices[0].message.content == "a " * 20 + "b"
    assert answer.choices[0].finish_reason == "stop"


async def test_a_chat_is_streamed_with_its_usage_last(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks[:-1]] == ["to", " be", " or", " not"]
    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", None, None, None]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


async def test_completions_of_several_prompts_are_numbered_together(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="echo", prompt=["a b", "c"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a b"), (1, "a b"), (2, "c"), (3, "c")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    tokens = await client.completions.create(model="echo", prompt=[5, 6], stop=["6"])
    assert tokens.choices[0].text == "5"


async def test_a_completion_is_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="echo", prompt="a b c", stream=True, extra_body={"ignore_eos": True})
    assert "".join([chunk.choices[0].text async for chunk in stream]).split() == ["a", "b", "c"] * 5 + ["a"]


async def test_log_probabilities_have_openais_form(client: openai.AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(model="talker", messages=HELLO, logprobs=True, top_logprobs=1)
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None
    assert [(each.token, each.logprob) for each in content] == [("Good", -0.5), (" day", -0.5)]
    assert [(top.token, top.logprob, bytes(top.bytes or ())) for top in content[0].top_logprobs] == [
        (" é", -0.25, " é".encode())
    ]
    text = await client.completions.create(model="talker", prompt="x", logprobs=2)
    told = text.choices[0].logprobs
    assert told is not None
    assert (told.tokens, told.token_logprobs, told.text_offset) == (["Good", " day"], [-0.5, -0.5], [0, 4])
    assert told.top_logprobs == [{" é": -0.25, "Good": -0.5}, {" é": -0.25, " day": -0.5}]


async def test_a_response_format_reaches_the_engine(client: openai.AsyncOpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "empty", "schema": {"type": "object"}}}
    answer = await client.chat.completions.create(model="talker", messages=HELLO, response_format=wanted)
    assert answer.choices[0].message.content == "{}"


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_embeddings_come_in_both_forms(client: openai.AsyncOpenAI, form: Any, pools: Any) -> None:
    answer = await client.embeddings.create(model="vectors", input=["a b", "c"], encoding_format=form, dimensions=4)
    assert [each.index for each in answer.data] == [0, 1]
    assert answer.usage.total_tokens == 3
    direct = (await pools["vectors"].embed("a b", dimensions=4)).vector
    if form == "float":
        assert answer.data[0].embedding == pytest.approx(direct)


async def test_what_is_sent_has_openais_types_to_the_letter(http: httpx2.AsyncClient) -> None:
    from openai.types import Completion, CreateEmbeddingResponse
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    ask: dict[str, Any] = {"model": "talker", "messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = await http.post("/v1/chat/completions", json=ask)
    ChatCompletion.model_validate_json(whole.content, strict=True, extra="forbid")
    streamed = await http.post(
        "/v1/chat/completions", json={**ask, "stream": True, "stream_options": {"include_usage": True}}
    )
    *chunks, done = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
    assert done == "[DONE]"
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(chunk, strict=True, extra="forbid")
    assert json.loads(chunks[-1])["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    text = await http.post("/v1/completions", json={"model": "talker", "prompt": ["x", "y"], "logprobs": 1})
    Completion.model_validate_json(text.content, strict=True, extra="forbid")
    vectors = await http.post("/v1/embeddings", json={"model": "vectors", "input": "a"})
    CreateEmbeddingResponse.model_validate_json(vectors.content, strict=True, extra="forbid")


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        ({"messages": HELLO, "temperature": -1}, "sampling parameters"),
        ({"messages": HELLO, "bogus": 1}, "unknown field `bogus`"),
        ({"messages": "hello"}, r"Expected `array`.*\$\.messages"),
        ({"messages": []}, "the prompt is empty"),
        ({"messages": HELLO, "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'.*text only"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "json_schema.schema is missing"),
        ({"messages": HELLO, "logprobs": True}, "the echo engine has no model"),
        ({"messages": HELLO, "logprobs": True, "stream": True}, "the echo engine has no model"),
    ],
)
async def test_a_wrong_request_is_refused_with_the_reason(
    http: httpx2.AsyncClient, ask: dict[str, Any], said: str
) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "echo", **ask})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(said, error["message"]), error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"model": "echo"}'])
async def test_what_is_no_request_is_refused(http: httpx2.AsyncClient, body: bytes) -> None:
    response = await http.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert "not what OpenAI's API takes" in response.json()["error"]["message"]


async def test_a_request_that_is_too_large_is_refused(serve: Serve, pools: dict[str, EnginePool]) -> None:
    http = await serve(openai_app(pools, max_body=1000))
    response = await http.post("/v1/completions", json={"model": "echo", "prompt": "x" * 1000})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


async def test_one_bad_prompt_among_several_is_the_error_of_the_request(client: openai.AsyncOpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="refuses prompts with 'poison'"):
        await client.completions.create(model="slow", prompt=["x", "poison", "y"], max_tokens=1)


async def test_a_full_pool_is_a_429_with_a_time_to_wait(
    client: openai.AsyncOpenAI, http: httpx2.AsyncClient, pools: dict[str, EnginePool]
) -> None:
    import openai

    held = [pools["echo"].generate("x y z") for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="requests wait already") as caught:
        await client.chat.completions.create(model="echo", messages=HELLO)
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in held:
        await stream.aclose()


async def test_a_request_that_kills_engines_is_a_422_which_clients_do_not_send_again(
    client: openai.AsyncOpenAI, pools: dict[str, EnginePool]
) -> None:
    import openai

    poison: Any = [{"role": "user", "content": "lethal"}]
    with pytest.raises(openai.UnprocessableEntityError, match=r"replicas of pool .* were lost while they ran it"):
        await client.with_options(max_retries=3).chat.completions.create(model="slow", messages=poison)
    assert pools["slow"].stats().quarantined == 1


async def test_a_closed_pool_is_a_503(client: openai.AsyncOpenAI, pools: dict[str, EnginePool]) -> None:
    import openai

    await pools["echo"].aclose()
    with pytest.raises(openai.InternalServerError, match="is not open") as caught:
        await client.chat.completions.create(model="echo", messages=HELLO, stream=True)
    assert caught.value.status_code == 503


async def test_an_error_in_the_middle_of_a_stream_reaches_the_client(client: openai.AsyncOpenAI) -> None:
    import openai

    stream = await client.completions.create(model="breaking", prompt="fail", stream=True)
    assert (await anext(stream)).choices[0].text == "Good"
    with pytest.raises(openai.APIError, match="it broke off"):
        await anext(stream)


# -- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_request(
    http: httpx2.AsyncClient, pools: dict[str, EnginePool], stream: bool
) -> None:
    ask = {"model": "slow", "messages": HELLO, "stream": stream}

    async def in_flight(count: int) -> None:
        with anyio.fail_after(20):
            while pools["slow"].stats().in_flight != count:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.005)

    async with anyio.create_task_group() as group:

        async def read() -> None:
            async with http.stream("POST", "/v1/chat/completions", json=ask) as response:
                async for _ in response.aiter_bytes():
                    pass

        group.start_soon(read)
        await in_flight(1)
        group.cancel_scope.cancel()
    await in_flight(0)
    assert pools["slow"].stats().replicas[0].aborted == 1
