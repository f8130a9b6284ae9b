"""The same in Litestar: a pool in its lifespan, runs as responses, runs that end with their request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx2
import msgspec
import pytest
from litestar import Litestar, Request, get, post
from litestar.params import JSONBody

from actors import EnginePool, EngineSpec, LocalCluster
from arun import Application, ApplicationBuilder, Partial, RunFailed, RunFinished, State, action
from arun.web import EventStream, cancel_on_disconnect

from .conftest import Serve

pytestmark = pytest.mark.asyncio

AnyRequest = Request[Any, Any, Any]


class Question(msgspec.Struct):
    prompt: str


@action(reads=["prompt"], writes=["answer"])
async def ask(state: State, engine: EnginePool) -> AsyncIterator[State]:
    answer = ""
    async for delta in engine.generate(state["prompt"], max_tokens=1000):
        answer += delta.text
        yield state.update(answer=answer)


def service(**engine_args: Any) -> Litestar:
    @contextlib.asynccontextmanager
    async def lifespan(web: Litestar) -> AsyncGenerator[None, None]:
        spec = EngineSpec(model="echo", engine="echo", engine_args=engine_args)
        async with LocalCluster() as cluster, cluster.engines(spec) as pool:
            web.state.pool = pool
            web.state.app = ApplicationBuilder().with_actions(ask).with_resources(engine=pool).build()
            yield

    def session(request: AnyRequest, prompt: str) -> Application:
        app: Application = request.app.state.app
        return app.session(prompt=prompt)

    @post("/ask", status_code=200)
    async def ask_once(data: JSONBody[Question], request: AnyRequest) -> dict[str, str]:
        async with cancel_on_disconnect(request):
            result = await session(request, data.prompt).arun()
        return {"answer": result.state["answer"]}

    @post("/ask/stream", status_code=200)
    async def ask_stream(data: JSONBody[Question], request: AnyRequest) -> EventStream:
        return EventStream(session(request, data.prompt).astream(), only=(Partial, RunFinished, RunFailed))

    @get("/load")
    async def load(request: AnyRequest) -> dict[str, int]:
        [info] = await request.app.state.pool.info()
        return {"in_flight": info.load.in_flight, "aborted": info.load.aborted}

    return Litestar([ask_once, ask_stream, load], lifespan=[lifespan])


async def load_of(client: httpx2.AsyncClient) -> dict[str, int]:
    load: dict[str, int] = (await client.get("/load")).json()
    return load


async def test_a_run_is_awaited_and_streamed(serve: Serve) -> None:
    client = await serve(service())
    response = await client.post("/ask", json={"prompt": "one two"})
    assert (response.status_code, response.json()) == (200, {"answer": "one two"})
    response = await client.post("/ask/stream", json={"prompt": "one two"})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [msgspec.json.decode(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert [event["changed"] for event in events if event["type"] == "Partial"][-1] == {"answer": "one two"}
    assert events[-1]["type"] == "RunFinished"


@pytest.mark.parametrize("path", ["/ask", "/ask/stream"])
async def test_a_client_that_leaves_aborts_its_request(serve: Serve, path: str) -> None:
    client = await serve(service(token_seconds=1000.0))
    asking = asyncio.create_task(client.post(path, json={"prompt": "one two"}))
    while not (await load_of(client))["in_flight"]:
        pass
    asking.cancel()
    while not (await load_of(client))["aborted"]:
        pass
