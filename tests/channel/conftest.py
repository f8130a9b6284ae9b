from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import pytest

from arun.channel import Connection, Handler, Limits, connect_tcp, connect_unix, memory_pair, serve_tcp, serve_unix
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEFAULT_LIMITS = Limits()
TOKEN = b"a token that only the two sides know"


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def runtime(anyio_backend: str) -> AsyncIterator[Runtime]:
    async with Runtime() as runtime:
        yield runtime


class Link:
    """Connects a client to a handler over one kind of transport; closes everything at the end."""

    def __init__(self, kind: str, folder: str) -> None:
        self._kind = kind
        self._folder = folder
        self._closers: list[object] = []

    async def __call__(self, handler: Handler, *, limits: Limits = DEFAULT_LIMITS) -> Connection:
        if self._kind == "memory":
            client, server = memory_pair(handler_b=handler, limits=limits)
            self._closers.append(server)
        elif self._kind == "tcp":
            server = await serve_tcp(handler, token=TOKEN, limits=limits)
            self._closers.append(server)
            client = await connect_tcp(*server.address, token=TOKEN, limits=limits)
        else:
            path = f"{self._folder}/{len(self._closers)}.sock"
            server = await serve_unix(handler, path=path, token=TOKEN, limits=limits)
            self._closers.append(server)
            client = await connect_unix(path, token=TOKEN, limits=limits)
        self._closers.append(client)
        return client

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            for closer in reversed(self._closers):
                await closer.aclose()


@pytest.fixture(params=["memory", "tcp", "unix"])
async def link(
    request: pytest.FixtureRequest, runtime: Runtime, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Link]:
    link = Link(request.param, str(tmp_path_factory.mktemp("s")))
    yield link
    await link.aclose()
