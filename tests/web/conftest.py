from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import pytest
import pytest_asyncio
import uvicorn

Serve = Callable[[Any], Awaitable[httpx2.AsyncClient]]


class _Server(uvicorn.Server):
    """A uvicorn server that says when it listens."""

    def __init__(self, app: Any) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@pytest_asyncio.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serve an ASGI app with a real uvicorn on a free port of the loopback; gives a client of it."""
    running: list[tuple[_Server, asyncio.Task[None], httpx2.AsyncClient]] = []

    async def start(app: Any) -> httpx2.AsyncClient:
        listener = socket.create_server(("127.0.0.1", 0))
        server = _Server(app)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        ready = asyncio.create_task(server.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if task.done():
            await task
            pytest.fail("the server ended while it started")
        client = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30)
        running.append((server, task, client))
        return client

    yield start
    for server, task, client in running:
        await client.aclose()
        server.should_exit = True
        await task
