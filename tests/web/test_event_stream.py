from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from arun import Application, ApplicationBuilder, MisuseError, RunFinished, State, action
from arun.web import EventStream, cancel_on_disconnect

from .conftest import Serve

pytestmark = pytest.mark.asyncio


class Gate:
    """Lets a test hold an action at a known place and see what became of it."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.open = asyncio.Event()
        self.cleaned_up = asyncio.Event()


def counting(gate: Gate, **state: Any) -> Application:
    @action(reads=[], writes=["n"])
    async def count(state: State) -> AsyncIterator[State]:
        gate.started.set()
        try:
            yield state.update(n=1)
            await gate.open.wait()
            yield state.update(n=2)
        finally:
            gate.cleaned_up.set()

    return ApplicationBuilder().with_actions(count).with_state(**state).build()


def streaming(application: Application, **options: Any) -> Starlette:
    async def stream(request: Request) -> Response:
        return EventStream(application.session().astream(), **options)

    return Starlette(routes=[Route("/", stream, methods=["GET", "POST"])])


def parse(message: str) -> tuple[str, Any]:
    fields = dict(line.split(": ", 1) for line in message.splitlines())
    return fields["event"], msgspec.json.decode(fields["data"])


async def messages(response: Any) -> AsyncIterator[str]:
    buffer = ""
    async for text in response.aiter_text():
        buffer += text
        *whole, buffer = buffer.split("\n\n")
        for message in whole:
            yield message


async def test_events_arrive_while_the_run_goes_on(serve: Serve) -> None:
    gate = Gate()
    client = await serve(streaming(counting(gate)))
    seen: list[tuple[str, Any]] = []
    async with client.stream("POST", "/") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        async for message in messages(response):
            seen.append(parse(message))
            if seen[-1][0] == "Partial":
                gate.open.set()  # the second half runs only because the first partial has arrived
    assert [kind for kind, _ in seen] == [
        "RunStarted", "ActionStarted", "Partial", "Partial", "ActionFinished", "RunFinished",
    ]  # fmt: skip
    assert [data["changed"] for kind, data in seen if kind == "Partial"] == [{"n": 1}, {"n": 2}]
    assert [data["seq"] for _, data in seen] == [1, 2, 3, 4, 5, 6]


async def test_only_the_chosen_events_are_sent(serve: Serve) -> None:
    gate = Gate()
    gate.open.set()
    client = await serve(streaming(counting(gate), only=(RunFinished,)))
    response = await client.get("/")
    kind, data = parse(response.text.strip())
    assert (kind, data["state"]) == ("RunFinished", {"n": 2})


async def test_a_client_that_leaves_cancels_the_run(serve: Serve) -> None:
    gate = Gate()
    client = await serve(streaming(counting(gate)))
    async with client.stream("POST", "/") as response:
        async for message in messages(response):
            if parse(message)[0] == "Partial":
                break
    await gate.cleaned_up.wait()
    assert not gate.open.is_set()


async def test_a_failing_run_ends_with_its_error(serve: Serve) -> None:
    @action(reads=[], writes=[])
    async def fail(state: State) -> State:
        raise LookupError("no such row")

    client = await serve(streaming(ApplicationBuilder().with_actions(fail).build()))
    response = await client.get("/")
    kind, data = parse(response.text.strip().split("\n\n")[-1])
    assert (kind, data["error"]) == ("RunFailed", "LookupError: no such row")


async def test_a_value_without_json_form_is_named_in_an_error_event(serve: Serve) -> None:
    @action(reads=[], writes=["thing"])
    async def make(state: State) -> State:
        return state.update(thing=Gate())

    client = await serve(streaming(ApplicationBuilder().with_actions(make).build()))
    kind, data = parse((await client.get("/")).text.strip().split("\n\n")[-1])
    assert kind == "error"
    assert "a Gate has no JSON form" in data["error"]


async def test_silence_is_filled_with_comments(serve: Serve) -> None:
    gate = Gate()
    client = await serve(streaming(counting(gate), ping=0.01))
    async with client.stream("POST", "/") as response:
        async for message in messages(response):
            if message == ": ping":
                gate.open.set()
    assert gate.open.is_set()


async def test_what_is_no_stream_of_a_run_is_refused_before_anything_is_sent() -> None:
    app = counting(Gate())

    async def lines() -> AsyncIterator[bytes]:
        yield b""

    wrong: list[tuple[Any, str]] = [
        (app, "an Application"),
        (app.arun(), "a coroutine"),
        (lines(), "an async generator"),
    ]
    for stream, kind in wrong:
        with pytest.raises(MisuseError, match=rf"EventStream\(\) takes what app\.astream\(\) returned, not {kind}"):
            EventStream(stream)


async def test_head_does_not_start_the_run(serve: Serve) -> None:
    gate = Gate()
    client = await serve(streaming(counting(gate)))
    response = await client.head("/")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert not gate.started.is_set()


async def test_cancel_on_disconnect_cancels_a_plain_handler(serve: Serve) -> None:
    gate = Gate()
    application = counting(gate)

    async def once(request: Request) -> Response:
        await request.body()
        async with cancel_on_disconnect(request):
            await application.session().arun()
        return JSONResponse({})

    client = await serve(Starlette(routes=[Route("/", once, methods=["POST"])]))
    request = asyncio.create_task(client.post("/"))
    await gate.started.wait()
    request.cancel()
    await gate.cleaned_up.wait()
    assert not gate.open.is_set()


async def test_cancel_on_disconnect_leaves_results_and_errors_as_they_are(serve: Serve) -> None:
    async def answer(request: Request) -> Response:
        async with cancel_on_disconnect(request):
            if request.query_params:
                raise LookupError("no such row")
            return JSONResponse({"answer": 42})

    async def not_found(request: Request, exc: Exception) -> Response:
        return JSONResponse({"error": str(exc)}, 404)

    app = Starlette(routes=[Route("/", answer)], exception_handlers={LookupError: not_found})
    client = await serve(app)
    assert (await client.get("/")).json() == {"answer": 42}
    assert (await client.get("/?bad=1")).status_code == 404
