"""Noticing that the client has left. ASGI servers don't cancel a handler for it; they only say so when asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
from starlette.exceptions import HTTPException

__all__ = ("cancel_on_disconnect", "disconnected")

#: nginx's code for it; nobody is left to read it, but logs show why the request ended.
_CLIENT_CLOSED_REQUEST = 499


class _Request(Protocol):
    """Starlette's, FastAPI's or Litestar's."""

    @property
    def receive(self) -> Callable[[], Awaitable[Any]]: ...


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def cancel_on_disconnect(request: _Request) -> AsyncGenerator[None, None]:
    """Cancel the body of this block when the client leaves, and wait for its clean-up.

    The request's body must have been read (FastAPI and Litestar have, before they call a handler that takes it). An
    error of the block is raised as itself.

    :raises starlette.exceptions.HTTPException: status 499, when the client left.

    >>> async with cancel_on_disconnect(request):
    ...     _, _, state = await app.session(prompt=prompt).arun()
    """
    failure: Exception | None = None
    left = False

    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal left
            await disconnected(request.receive)
            left = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            yield
        except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
            failure = exc
        finally:
            group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if left:
        raise HTTPException(_CLIENT_CLOSED_REQUEST, "client closed request")
