"""examples/fastapi_stream.py behind a real uvicorn: on EchoEngine, and on vLLM."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from .conftest import Serve

pytestmark = pytest.mark.asyncio

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fastapi_stream.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastapi_stream", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastapi_stream", module)
    spec.loader.exec_module(module)
    return module


async def events(response: Any) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield msgspec.json.decode(line.removeprefix("data: "))


async def answers_stream_and_leaving_aborts(example: ModuleType, serve: Serve, long_prompt: str) -> None:
    client = await serve(example.web)
    whole = (await client.post("/ask", json={"prompt": "What is an actor?"})).json()
    assert set(whole["answers"]) == set(example.STYLES)
    assert all(whole["answers"].values())

    async with client.stream("POST", "/ask/stream", json={"prompt": "What is an actor?"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        kinds = [event["type"] async for event in events(response)]
    assert kinds[-1] == "RunFinished"
    assert kinds.count("Partial") >= 1

    # A client that leaves: its run's requests are aborted, and the pool has none in flight.
    pool = example.web.state.pool
    while not (await engine_load(pool)).aborted:  # one that left too late is followed by another
        leaving = asyncio.create_task(client.post("/ask", json={"prompt": long_prompt}))
        while not (await engine_load(pool)).in_flight and not leaving.done():
            pass  # asked again: the engine's own word is what counts
        leaving.cancel()
        while (await engine_load(pool)).in_flight:
            pass
    assert not any(replica.in_flight for replica in pool.stats().replicas)


async def engine_load(pool: Any) -> Any:
    [info] = await pool.info()
    return info.load


async def test_the_example_on_echo_engine(example: ModuleType, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "echo")
    await answers_stream_and_leaving_aborts(example, serve, "word " * 200)


@pytest.mark.engine
async def test_the_example_on_vllm(example: ModuleType, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "tiny")
    monkeypatch.setattr(example, "MAX_TOKENS", 400)  # long enough to leave in the middle
    await answers_stream_and_leaving_aborts(example, serve, "What is an actor?")
