"""Engines for the tests of OpenAI's API, and a server that does what a test tells it to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from actors import Delta, EngineSpec, GenerateRequest, Usage
from actors.answers import Logprob
from actors.engine import EngineLoad
from arun.errors import EngineError, ReplicaLost


class Talker:
    """Answers with one word a delta, with log-probabilities and with whatever it was asked for."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    async def start(self) -> None: ...

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        sampling = request.sampling
        wanted = sampling.structured_outputs
        answer = ["{", "}"] if wanted is not None and wanted.json is not None else ["Good", " day"]
        for number, word in enumerate(answer):
            for index in range(sampling.n):
                logprobs = None
                if sampling.logprobs is not None:
                    top = [Logprob(number, -0.5, 2, word), Logprob(7, -0.25, 1, " é")]
                    logprobs = [top[: 1 + sampling.logprobs]]
                last = number == len(answer) - 1
                done = last and index == sampling.n - 1
                usage = Usage(5, 2 * sampling.n, 3) if done else None
                yield Delta(word, [number], index, "stop" if last else None, usage, logprobs=logprobs)

    async def check_health(self) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad()

    async def stop(self) -> None: ...


class Breaking(Talker):
    """Breaks off its answers after a delta; a prompt of "fail" fails there in another way."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        yield Delta("Good", [1])
        raise (EngineError if request.prompt == "fail" else ReplicaLost)("it broke off")


Reply = Callable[[Request], Awaitable[Response]]


class Scripted:
    """A server whose next replies are given; keeps the requests that it got."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.seen: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/{path:path}", self._reply, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "m"}]})

    async def _reply(self, request: Request) -> Response:
        self.seen.append((request.path_params["path"], await request.json()))
        self.headers.append(dict(request.headers))
        return await self.replies.pop(0)(request)


def status(
    number: int, message: str = "no", *, code: str | None = None, headers: dict[str, str] | None = None
) -> Reply:
    """An error."""

    async def reply(request: Request) -> Response:
        return JSONResponse({"error": {"message": message, "code": code}}, number, headers)

    return reply


def text(number: int, body: str) -> Reply:
    """An answer that is no JSON."""

    async def reply(request: Request) -> Response:
        return Response(body, number)

    return reply


def raw(body: bytes, **headers: str) -> Reply:
    """What a server sends as events, to the byte."""

    async def reply(request: Request) -> Response:
        return Response(body, headers=headers, media_type="text/event-stream; charset=latin-1")

    return reply


def events(*data: str, cut: bool = False) -> Reply:
    """Server-sent events; ``cut`` breaks the connection after them."""

    async def stream() -> AsyncIterator[str]:
        for each in data:
            yield f"data: {each}\n\n"
        if cut:
            raise ConnectionAbortedError

    async def reply(request: Request) -> Response:
        return StreamingResponse(stream(), media_type="text/event-stream")

    return reply
