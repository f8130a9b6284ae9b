"""Batches: many requests through one pool, lazily, on the kernel of :mod:`arun.fanout`."""

from __future__ import annotations

import functools
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping
from typing import Any

from actors.answers import Completion
from actors.requests import PromptLike
from arun.errors import MisuseError

__all__ = ("BatchRequest", "calls")

BatchRequest = PromptLike | Mapping[str, Any]
"""A prompt; or the arguments of ``generate()`` by name, ``prompt`` among them."""

Call = Callable[[], Awaitable[Completion]]


async def calls(
    complete: Callable[..., Awaitable[Completion]],
    requests: Iterable[BatchRequest] | AsyncIterable[BatchRequest],
    options: Mapping[str, Any],
) -> AsyncGenerator[Call, None]:
    """One call of ``complete`` for each request, made when it is asked for.

    :param options: arguments that a request which is a mapping may override.
    """
    batch = uuid.uuid4().hex[:8]
    number = 0
    source = aiter(requests) if isinstance(requests, AsyncIterable) else iter(requests)
    try:
        while True:
            try:
                request = await anext(source) if isinstance(source, AsyncIterable) else next(source)
            except (StopIteration, StopAsyncIteration):
                return
            arguments = {"request_id": f"{batch}-{number}", **options, **_arguments(request, number)}
            yield functools.partial(complete, **arguments)
            number += 1
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def _arguments(request: BatchRequest, number: int) -> Mapping[str, Any]:
    if not isinstance(request, Mapping):
        return {"prompt": request}
    if "prompt" not in request:
        raise MisuseError(f"request {number} of this batch has no 'prompt'; it has {', '.join(map(str, request))}")
    return request
