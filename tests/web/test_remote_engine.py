"""RemoteEngine: against our own endpoints, and against a server that fails as it is told."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import pytest_asyncio
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from actors import (
    Completion,
    Delta,
    EnginePool,
    EngineSpec,
    GenerateRequest,
    LocalCluster,
    RemoteEngine,
    Reset,
    Sampling,
    Usage,
)
from actors.requests import to_embed_request, to_request
from arun.errors import EngineError, MissingExtraError, MisuseError, PoolBusy, ReplicaLost, RequestError
from arun.web.disconnect import disconnected
from arun.web.openai import openai_app
from tests.web.conftest import Serve
from tests.web.samples import Breaking, Scripted, Talker, events, raw, status, text

pytestmark = pytest.mark.asyncio

CHAT: Any = [{"role": "user", "content": "to be or not"}]
WORD = '{"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": null}]}'
ABORT = '{"choices": [{"index": 0, "delta": {}, "finish_reason": "abort"}]}'  # vLLM's, when it is told to end
STOP = '{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}'
USAGE = '{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}'
WHOLE = (WORD, STOP, USAGE, "[DONE]")

Remote = Callable[..., Any]


def spec_of(url: object, model: str = "m", **options: Any) -> EngineSpec:
    return EngineSpec(model=model, engine="remote", engine_args={"base_url": f"{url}/v1", **options})


@pytest_asyncio.fixture
async def local() -> AsyncIterator[dict[str, EnginePool]]:
    """What our own endpoints serve."""
    async with LocalCluster(isolation="task", cpus=8) as cluster:
        slow = EngineSpec(model="echo", engine="echo", engine_args={"token_seconds": 1000.0})
        pools = {
            "echo": cluster.engines(EngineSpec(model="echo", engine="echo")),
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
async def url(serve: Serve, local: dict[str, EnginePool]) -> str:
    return str((await serve(openai_app(local))).base_url)


@asynccontextmanager
async def pool_of(spec: EngineSpec, **options: Any) -> AsyncIterator[EnginePool]:
    async with LocalCluster(cpus=8) as cluster, cluster.engines(spec, **options) as pool:
        yield pool


@pytest_asyncio.fixture
async def engine_at(serve: Serve) -> AsyncIterator[Callable[..., Awaitable[RemoteEngine]]]:
    """Starts an engine at a server."""
    engines: list[RemoteEngine] = []

    async def start(server: Scripted, **options: Any) -> RemoteEngine:
        engine = RemoteEngine(spec_of((await serve(server.app)).base_url, **options))
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.stop()


async def ask(engine: RemoteEngine, prompt: Any = CHAT, **options: Any) -> list[Delta]:
    return [delta async for delta in engine.generate(to_request("r", prompt, options))]


# -- our own endpoints -----------------------------------------------------------------------------------------------


async def test_it_is_an_engine_like_any_other_and_needs_no_process(url: str, local: dict[str, EnginePool]) -> None:
    async with pool_of(spec_of(url, "echo")) as pool:
        for prompt in ("to be or not", [5, 6, 7], CHAT):
            there, here = await pool.complete(prompt, max_tokens=3), await local["echo"].complete(prompt, max_tokens=3)
            assert (there.text, there.finish_reason, there.usage) == (here.text, here.finish_reason, here.usage)
        assert pool.stats().replicas[0].pid == os.getpid()
        assert [delta.text async for delta in pool.generate(CHAT)] == ["to", " be", " or", " not"]
        assert (await pool.info())[0].load.tokens == pool.stats().replicas[0].tokens == 3 * 3 + 4


async def test_several_answers_and_stop_strings(url: str) -> None:
    async with pool_of(spec_of(url, "echo")) as pool:
        answer = await pool.complete("a b c", n=3, stop=["c"])
        assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
            (index, "a b", "stop") for index in range(3)
        ]
        assert answer.usage.completion_tokens == 6


@pytest.mark.parametrize("prompt", ["x", CHAT])
async def test_log_probabilities_come_back(url: str, prompt: Any) -> None:
    async with pool_of(spec_of(url, "talker")) as pool:
        answer = await pool.complete(prompt, logprobs=2)
        assert answer.logprobs is not None
        assert [[(each.text, each.logprob, each.rank) for each in tokens] for tokens in answer.logprobs] == [
            [("Good", -0.5, 2), (" é", -0.25, 1)],
            [(" day", -0.5, 2), (" é", -0.25, 1)],
        ]
        assert answer.usage.cached_tokens == 3


async def test_a_text_may_be_sent_as_a_chat(url: str) -> None:
    async with pool_of(spec_of(url, "talker", text_as="chat", max_tokens_name="max_completion_tokens")) as pool:
        assert (await pool.complete("x", structured_outputs={"json": {"type": "object"}})).text == "{}"


async def test_what_vllm_adds_to_the_api_is_sent_to_those_who_know_it(url: str) -> None:
    async with pool_of(spec_of(url, "echo", dialect="vllm")) as pool:
        assert (await pool.complete("a b", max_tokens=5, ignore_eos=True)).text == "a b a b a"
    async with pool_of(spec_of(url, "talker", dialect="vllm")) as pool:
        assert (await pool.complete("a", structured_outputs={"json": "{}"}, top_k=3)).text == "{}"


async def test_embeddings_are_equal_to_local_ones(url: str, local: dict[str, EnginePool]) -> None:
    spec = EngineSpec(model="vectors", engine="remote", runner="pooling", engine_args={"base_url": f"{url}/v1"})
    async with pool_of(spec) as pool:
        there, here = await pool.embed("a b a", dimensions=8), await local["vectors"].embed("a b a", dimensions=8)
        assert (there.data, there.prompt_tokens) == (here.data, here.prompt_tokens)


async def test_leaving_an_answer_ends_it_at_the_server(url: str, local: dict[str, EnginePool]) -> None:
    async with pool_of(spec_of(url, "slow")) as pool:
        stream = pool.generate(CHAT)
        assert (await anext(stream)).text == "to"
        await stream.aclose()
        with anyio.fail_after(20):
            while local["slow"].stats().in_flight:  # noqa: ASYNC110 - nothing tells
                await anyio.sleep(0.005)
        assert (await pool.info())[0].load.aborted == 1


async def test_many_answers_at_a_time(url: str) -> None:
    async with pool_of(spec_of(url, "echo")) as pool:
        outcomes = pool.map([f"word {n}" for n in range(200)])
        texts = {outcome.value.text async for outcome in outcomes}  # type: ignore[union-attr]  # they succeed
        assert texts == {f"word {n}" for n in range(200)}


# -- answers that break off ------------------------------------------------------------------------------------------


async def test_an_answer_that_breaks_off_is_lost_and_its_replica_goes_on(url: str) -> None:
    async with pool_of(spec_of(url, "breaking")) as pool:
        stream = pool.generate("x")
        assert (await anext(stream)).text == "Good"
        with pytest.raises(EngineError, match="it broke off"):
            await anext(stream)
        assert pool.stats().restarts == 0


@pytest.mark.parametrize("last", [events(WORD, cut=True), events(WORD), events(WORD, ABORT)])
async def test_a_connection_that_is_cut_after_a_delta_is_told(engine_at: Remote, last: Any) -> None:
    engine = await engine_at(Scripted(last))
    with pytest.raises(ReplicaLost, match=r"broke off after 1 deltas: .*reroute='restart'"):
        await ask(engine)
    assert engine.load().failed == 1


async def test_a_connection_that_is_cut_before_the_first_delta_is_tried_again(engine_at: Remote) -> None:
    server = Scripted(events(cut=True), events(), events(*WHOLE))
    engine = await engine_at(server)
    (first, last) = await ask(engine)
    assert (first.text, last.finish_reason) == ("Hi", "stop")
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 1)
    assert len(server.seen) == 3


async def test_a_server_that_always_cuts_is_given_up(engine_at: Remote) -> None:
    engine = await engine_at(Scripted(*[events()] * 2), attempts=2)
    with pytest.raises(EngineError, match=r"broke off 2 answers before their first delta: .*without a finish_r"):
        await ask(engine)


async def test_an_answer_begins_anew_where_that_was_asked_for(serve: Serve) -> None:
    server = Scripted(events(WORD, cut=True), events(*WHOLE))
    async with pool_of(spec_of((await serve(server.app)).base_url)) as pool:
        deltas = [delta async for delta in pool.generate(CHAT, reroute="restart")]
        assert [(type(delta), delta.text) for delta in deltas] == [
            (Delta, "Hi"),
            (Reset, ""),
            (Delta, "Hi"),
            (Delta, ""),
        ]
        server.replies = [events(WORD, cut=True), events(*WHOLE)]
        assert (await pool.complete(CHAT)).text == "Hi"
        server.replies = [events(WORD, cut=True)] * 4
        with pytest.raises(ReplicaLost):
            await pool.complete(CHAT)
        assert len(server.replies) == 1  # three starts
        stats = pool.stats()
        assert (stats.restarts, stats.in_flight, stats.waiting) == (0, 0, 0)


async def test_a_server_that_tells_no_usage_is_taken_as_it_is(engine_at: Remote) -> None:
    engine = await engine_at(Scripted(events(WORD, STOP)))
    assert (await ask(engine))[-1].usage is not None


@pytest.mark.parametrize(
    "usage", ["null", '{"prompt_tokens": null}', '{"prompt_tokens": 3.0, "completion_tokens": 0}', "{}"]
)
async def test_what_a_server_tells_of_the_usage_breaks_no_answer(engine_at: Remote, usage: str) -> None:
    last = f'{{"choices": null, "usage": {usage}}}'
    deltas = await ask(await engine_at(Scripted(events(WORD, STOP, last, " [DONE] "))))
    assert "".join(delta.text for delta in deltas) == "Hi"
    assert deltas[-1].usage in {Usage(0, 0), Usage(3, 0)}


@pytest.mark.parametrize(
    ("before", "said", "after", "read"),
    [
        (b"\xef\xbb\xbfdata: ", b"Hi", b"\n\n", "Hi"),  # a byte order mark
        (b": still here\n\n\n\ndata: \n\nevent: ping\ndata:\n\ndata: ", b"Hi", b"\n\n", "Hi"),
        (b"data:", b"Hi", b"\r\rid: 3\r\nretry: 5\r\n\r\n", "Hi"),
        (b"data: ", "\xe9".encode(), b"\n\n", "\xe9"),  # in UTF-8, whatever the header says
        (b"data: ", b"\xff!", b"\n\n", "\ufffd!"),
        (b"data: ", rb"a\ud83d", b"\n\n", "a\ufffd"),  # half a character
        (b"data: ", b"x" * 2**21, b"\n\n", "x" * 2**21),
    ],
    ids=["mark", "empty", "lines", "charset", "no text", "half", "large"],
)
@pytest.mark.parametrize("zipped", [False, True])
async def test_events_are_read_in_every_form_that_servers_give_them(
    engine_at: Remote, before: bytes, said: bytes, after: bytes, read: str, zipped: bool
) -> None:
    body = before + WORD.encode().replace(b"Hi", said) + after + f"data: {STOP}\n\n".encode()
    reply = raw(gzip.compress(body), **{"content-encoding": "gzip"}) if zipped else raw(body)
    deltas = await ask(await engine_at(Scripted(reply)))
    assert "".join(delta.text for delta in deltas) == read


async def test_a_redirect_is_not_followed_but_told(engine_at: Remote) -> None:
    server = Scripted(status(307, headers={"location": "https://elsewhere/v1"}))
    engine = await engine_at(server)
    with pytest.raises(
        EngineError, match=r"answered 307: no\. It redirects to https://elsewhere/v1; give the base_url"
    ):
        await ask(engine)


async def test_what_can_not_be_unpacked_is_told(engine_at: Remote) -> None:
    garbled = raw(b"data: {}\n\n", **{"content-encoding": "gzip"})
    engine = await engine_at(Scripted(garbled, garbled, garbled), attempts=1)
    with pytest.raises(EngineError, match=r"broke off 1 answers before their first delta: .*incorrect header"):
        await ask(engine)
    with pytest.raises(EngineError, match=r"the answer of .* broke off: .*incorrect header"):
        await anext(engine.generate(to_embed_request("r", "x", {})))


async def test_what_is_no_answer_is_told(engine_at: Remote) -> None:
    deep = WORD.replace('"Hi"', "[" * 3000 + "]" * 3000)
    server = Scripted(events("{"), text(200, "<html>"), events(deep))
    engine = await engine_at(server)
    with pytest.raises(EngineError, match="no chunk of an answer"):
        await ask(engine)
    with pytest.raises(EngineError, match=r"asked for a stream and answered with none: <html>"):
        await ask(engine)
    with pytest.raises(EngineError, match="no chunk of an answer"):
        await ask(engine)
    assert len(server.seen) == 3


@pytest.mark.parametrize("gone", ['{"error": {"message": "the GPU is gone"}}', "the GPU is gone\nevent: error"])
async def test_an_error_in_the_middle_of_a_stream_is_told(engine_at: Remote, gone: str) -> None:
    refused = '{"error": {"message": "too long", "type": "invalid_request_error"}}'
    engine = await engine_at(Scripted(events(WORD, gone), events(refused)))
    with pytest.raises(EngineError, match="broke off its answer: the GPU is gone"):
        await ask(engine)
    with pytest.raises(RequestError, match="too long"):
        await ask(engine)


# -- errors of the server --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 404, 413, 422])
async def test_a_refused_request_is_not_tried_again(engine_at: Remote, code: int) -> None:
    server = Scripted(status(code, "the prompt is too long"))
    engine = await engine_at(server)
    with pytest.raises(RequestError, match=f"answered {code}: the prompt is too long"):
        await ask(engine)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "body", ['{"detail": "so it is"}', '{"error": "so it is"}', "so it is", '{"message": "so it is"}']
)
async def test_errors_in_other_forms_are_read_too(engine_at: Remote, body: str) -> None:
    engine = await engine_at(Scripted(text(400, body)))
    with pytest.raises(RequestError, match="so it is"):
        await ask(engine)


async def test_a_busy_or_failing_server_is_asked_again(engine_at: Remote) -> None:
    server = Scripted(status(429, headers={"retry-after": "0"}), status(503), text(502, "<html>"), events(*WHOLE))
    engine = await engine_at(server, max_wait=0.01)
    assert (await ask(engine))[0].text == "Hi"
    assert len(server.seen) == 4


async def test_a_server_that_stays_busy_or_failing_is_told_with_the_attempts(engine_at: Remote) -> None:
    server = Scripted(*[status(429, "slow down")] * 2, *[status(500, "oops")] * 2)
    engine = await engine_at(server, max_wait=0.01, attempts=2)
    with pytest.raises(PoolBusy, match=r"answered 429: slow down \(attempt 2 of 2\)"):
        await ask(engine)
    with pytest.raises(EngineError, match=r"answered 500: oops \(attempt 2 of 2\)"):
        await ask(engine)


@pytest.mark.parametrize("after", ["100", "Fri, 31 Dec 2100 23:59:59 GMT"])
async def test_a_server_that_asks_for_a_long_wait_is_not_waited_for(engine_at: Remote, after: str) -> None:
    engine = await engine_at(Scripted(status(429, headers={"retry-after": after})))
    with pytest.raises(PoolBusy, match=r"it asks to wait \d.* s \(attempt 1 of 5\)"):
        await ask(engine)


async def test_a_quota_that_is_used_up_is_not_waited_for(engine_at: Remote) -> None:
    engine = await engine_at(Scripted(status(429, "no money", code="insufficient_quota")))
    with pytest.raises(EngineError, match="no money") as caught:
        await ask(engine)
    assert not isinstance(caught.value, PoolBusy)


async def test_a_server_that_does_not_answer_fails_that_request(engine_at: Remote) -> None:
    async def silent(request: Request) -> Response:
        await disconnected(request.receive)
        return Response()

    engine = await engine_at(Scripted(silent), timeout=0.2)
    with pytest.raises(EngineError, match=r"did not begin to answer within 0\.2 s"):
        await ask(engine)


async def test_a_server_that_falls_silent_is_told_as_what_it_is(engine_at: Remote) -> None:
    async def silent(request: Request) -> Response:
        async def stream() -> AsyncIterator[str]:
            yield f"data: {WORD}\n\n"
            await disconnected(request.receive)

        return StreamingResponse(stream(), media_type="text/event-stream")

    engine = await engine_at(Scripted(silent), timeout=0.2)
    with pytest.raises(ReplicaLost, match=r"broke off after 1 deltas: ReadTimeout\. "):
        await ask(engine)


async def test_a_server_that_is_not_there_is_told_at_the_start() -> None:
    engine = RemoteEngine(spec_of("http://127.0.0.1:9", attempts=2, max_wait=0.01))
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/v1 can't be reached.*attempt 2 of 2"):
        await engine.start()
    await engine.stop()


async def test_a_model_that_is_not_listed_is_warned_of(engine_at: Remote) -> None:
    with structlog.testing.capture_logs() as logs:
        await engine_at(Scripted(), model="other")
    assert [(each["event"], each["listed"]) for each in logs] == [("remote.model_not_listed", ["m"])]


# -- the key ---------------------------------------------------------------------------------------------------------


async def test_the_key_is_sent_and_never_shown(engine_at: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-secret-4711"
    monkeypatch.setenv("SOME_KEY", key)
    server = Scripted(events(*WHOLE), status(401, f"wrong key {key}"), status(500, f"{key}!"))
    with structlog.testing.capture_logs() as logs:
        engine = await engine_at(server, api_key_env="SOME_KEY", attempts=1)
        await ask(engine)
        assert server.headers[0]["authorization"] == f"Bearer {key}"
        with pytest.raises(EngineError, match=r"wrong key \*\*\*\. Check the key in SOME_KEY") as caught:
            await ask(engine)
        with pytest.raises(EngineError, match=r"answered 500: \*\*\*!"):
            await ask(engine)
    shown = [repr(engine), repr(engine._spec), str(vars(engine)), repr(logs)]
    trace = caught.value.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename != __file__:  # what tools that show local variables would show
            shown += map(repr, trace.tb_frame.f_locals.values())
        trace = trace.tb_next
    assert len(shown) > 10
    assert not [each for each in shown if key in each]


async def test_a_key_that_is_not_there_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EngineError, match="api_key_env='NO_SUCH_KEY': there is no such environment variable"):
        async with pool_of(spec_of("http://127.0.0.1:9", api_key_env="NO_SUCH_KEY")):
            pass


# -- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("x", {"top_k": 3}, "top_k: OpenAI's API has no such parameter.*'dialect': 'vllm'"),
        ("x", {"prompt_logprobs": 3}, "prompt_logprobs"),
        ("x", {"max_tokens": None}, "max_tokens=None: a completion of OpenAI's API has 16 then"),
        ("x", {"logprobs": -1}, "logprobs=-1"),
        ("x", {"structured_outputs": {"json": {}}}, "for chats only"),
        (CHAT, {"structured_outputs": {"regex": "a"}}, "structured_outputs 'regex'"),
        (CHAT, {"structured_outputs": {"json": "{"}}, "is no JSON"),
        (CHAT, {"tools": [{}]}, "tools"),
        (CHAT, {"chat_template": "x"}, "chat_template"),
        ("x", {"adapter": "a"}, "adapter"),
    ],
)
async def test_what_the_api_can_not_say_is_refused_by_name(
    engine_at: Remote, prompt: Any, options: dict[str, Any], said: str
) -> None:
    server = Scripted()
    engine = await engine_at(server)
    with pytest.raises(RequestError, match=said):
        await ask(engine, prompt, **options)
    assert server.seen == []


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (EngineSpec(model="m", engine="remote"), "missing required field `base_url`"),
        (spec_of("http://x", bogus=1), "unknown field `bogus`; known are base_url, api_key_env"),
        (
            EngineSpec(model="m", engine="remote", tensor_parallel_size=2, engine_args={"base_url": "http://x"}),
            "server's",
        ),
    ],
)
async def test_a_wrong_spec_is_refused(spec: EngineSpec, said: str) -> None:
    with pytest.raises(MisuseError, match=said):
        RemoteEngine(spec)


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://x", "http://user:password@x"])
async def test_a_wrong_url_is_refused_without_showing_a_password(url: str) -> None:
    engine = RemoteEngine(EngineSpec(model="m", engine="remote", engine_args={"base_url": url}))
    with pytest.raises(MisuseError, match="base_url") as caught:
        await engine.start()
    assert "password@" not in str(caught.value)


async def test_the_package_that_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"arun-runtime\[remote\]"):
        await RemoteEngine(spec_of("http://x")).start()


async def test_an_engine_that_does_not_run_says_so() -> None:
    engine = RemoteEngine(spec_of("http://x"))
    with pytest.raises(EngineError, match="does not run"):
        await anext(engine.generate(GenerateRequest("r", "x", Sampling())))


@pytest.mark.parametrize(
    ("prompt", "dialect", "sent"), [(CHAT, "openai", ()), (CHAT, "vllm", ()), ("x", "vllm", (("max_tokens", None),))]
)
async def test_an_answer_without_a_limit_is_asked_for_as_each_api_has_it(
    engine_at: Remote, prompt: Any, dialect: str, sent: tuple[Any, ...]
) -> None:
    server = Scripted(events(*WHOLE))
    engine = await engine_at(server, dialect=dialect)
    await ask(engine, prompt, max_tokens=None)
    [(_, body)] = server.seen
    assert [item for item in body.items() if item[0].startswith("max_")] == list(sent)


async def test_the_requests_have_openais_form(engine_at: Remote) -> None:
    server = Scripted(events(*WHOLE))
    engine = await engine_at(server, extra_body={"reasoning_effort": "low"})
    deltas = await ask(engine, CHAT, max_tokens=7, temperature=0.5, logit_bias={5: -1.0}, seed=1)
    assert Completion.of("r", deltas).text == "Hi"
    assert server.seen == [
        (
            "chat/completions",
            {
                "model": "m",
                "messages": CHAT,
                "max_tokens": 7,
                "temperature": 0.5,
                "seed": 1,
                "logit_bias": {"5": -1.0},
                "stream": True,
                "stream_options": {"include_usage": True},
                "reasoning_effort": "low",
            },
        )
    ]
