"""The endpoints: from an HTTP request to a backend and back; errors as OpenAI has them."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from arun.errors import EngineError, MisuseError, PoolBusy, RequestError, RequestQuarantined
from arun.logs import get_logger
from arun.web.disconnect import cancel_on_disconnect, disconnected
from arun.web.openai.answers import DONE, ChatWriter, CompletionWriter, embeddings, event
from arun.web.openai.backend import Backend, Choice, Completion, Deltas, Embedding, Usage
from arun.web.openai.requests import ChatRequest, CompletionRequest, EmbeddingRequest

__all__ = ("openai_app", "openai_routes")

log = get_logger("arun.web")

T = TypeVar("T")
R = TypeVar("R")

_COMPLETION_TOKENS = 16  # OpenAI's own, where a completion names no limit
_TOO_LARGE = 413
_BUSY = 429


def openai_app(models: Mapping[str, Backend], *, max_tokens: int = 4096, max_body: int = 32 * 2**20) -> Starlette:
    """An ASGI app with nothing but :func:`openai_routes`."""
    return Starlette(routes=openai_routes(models, max_tokens=max_tokens, max_body=max_body))


def openai_routes(models: Mapping[str, Backend], *, max_tokens: int = 4096, max_body: int = 32 * 2**20) -> list[Route]:
    """Routes for Starlette (FastAPI: ``app.router.routes.extend(routes)``) that speak OpenAI's API.

    A request whose client leaves is cancelled. Everybody who reaches them may use them: put authentication before them
    as before your other routes.

    :param models: backends, such as :class:`actors.EnginePool`, by the name that clients give as ``model``. Looked up
        at each request, so pools may come and go.
    :param max_tokens: of a chat that names no limit; a completion without one has 16, as OpenAI's.
    :param max_body: bytes that a request may have.
    """
    endpoints = _Endpoints(models, max_tokens, max_body)
    return [
        Route("/v1/models", _answering(endpoints.models), methods=["GET"]),
        Route("/v1/models/{model:path}", _answering(endpoints.model), methods=["GET"]),
        Route("/v1/chat/completions", _answering(endpoints.chat), methods=["POST"]),
        Route("/v1/completions", _answering(endpoints.completions), methods=["POST"]),
        Route("/v1/embeddings", _answering(endpoints.embeddings), methods=["POST"]),
    ]


class _Model(msgspec.Struct):
    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "arun"


class _Models(msgspec.Struct):
    data: list[_Model]
    object: str = "list"


class _UnknownModel(RequestError):
    """No model of that name is served here."""


class _Endpoints:
    def __init__(self, models: Mapping[str, Backend], max_tokens: int, max_body: int) -> None:
        self._models = models
        self._max_tokens = max_tokens
        self._max_body = max_body

    async def models(self, request: Request) -> Response:
        return _json(msgspec.json.encode(_Models([_Model(name) for name in self._models])))

    async def model(self, request: Request) -> Response:
        name: str = request.path_params["model"]
        self._backend(name)
        return _json(msgspec.json.encode(_Model(name)))

    async def chat(self, request: Request) -> Response:
        asked = await self._read(request, ChatRequest)
        backend = self._backend(asked.model)
        options = asked.options(self._max_tokens)
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        writer = ChatWriter(request_id, asked.model, options.get("logprobs", 0))
        if asked.stream:
            deltas = backend.generate(asked.prompt, request_id=request_id, **options)
            return _DeltaEvents(deltas, writer, include_usage=asked.include_usage)
        async with cancel_on_disconnect(request):
            whole = await backend.complete(asked.prompt, request_id=request_id, **options)
        return _json(writer.answer(list(whole.choices), [whole.usage]))

    async def completions(self, request: Request) -> Response:
        asked = await self._read(request, CompletionRequest)
        backend, prompts = self._backend(asked.model), asked.prompts
        options = asked.options(_COMPLETION_TOKENS)
        request_id = f"cmpl-{uuid.uuid4().hex}"
        writer = CompletionWriter(request_id, asked.model, options.get("logprobs", 0))
        if asked.stream:
            if len(prompts) > 1:
                raise RequestError("stream: one prompt at a time can be streamed; ask for each by itself")
            deltas = backend.generate(prompts[0], request_id=request_id, **options)
            return _DeltaEvents(deltas, writer, include_usage=asked.include_usage)

        async def complete(number: int, prompt: object) -> Completion:
            return await backend.complete(prompt, request_id=f"{request_id}-{number}", **options)

        async with cancel_on_disconnect(request):
            wholes = await _all(prompts, complete)
        choices: list[Choice] = [
            _Numbered(number, choice)
            for number, choice in enumerate(choice for whole in wholes for choice in whole.choices)
        ]
        return _json(writer.answer(choices, [whole.usage for whole in wholes]))

    async def embeddings(self, request: Request) -> Response:
        asked = await self._read(request, EmbeddingRequest)
        backend, options = self._backend(asked.model), asked.options()

        async def embed(number: int, prompt: object) -> Embedding:
            return await backend.embed(prompt, **options)

        async with cancel_on_disconnect(request):
            vectors = await _all(asked.inputs, embed)
        return _json(embeddings(asked.model, vectors, as_base64=asked.encoding_format == "base64"))

    def _backend(self, model: str) -> Backend:
        backend = self._models.get(model)
        if backend is None:
            raise _UnknownModel(f"there is no model {model!r} here; there are {', '.join(map(repr, self._models))}")
        return backend

    async def _read(self, request: Request, kind: type[T]) -> T:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body:
                raise HTTPException(_TOO_LARGE, f"the request has more than {self._max_body} bytes")
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
            raise RequestError(
                f"the request is not what OpenAI's API takes, or not what is known of it here: {exc}"
            ) from exc


class _Numbered:
    """A choice under another index: those of several prompts are numbered together."""

    def __init__(self, index: int, choice: Choice) -> None:
        self.index = index
        self.text = choice.text
        self.finish_reason = choice.finish_reason
        self.logprobs = choice.logprobs


class _DeltaEvents(Response):
    """Sends deltas as server-sent events. An error before the first one is an answer with its status."""

    def __init__(self, deltas: Deltas, writer: ChatWriter | CompletionWriter, *, include_usage: bool) -> None:
        self._deltas = deltas
        self._writer = writer
        self._include_usage = include_usage
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        })
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    await disconnected(receive)
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                await self._answer(scope, receive, send)
                group.cancel_scope.cancel()
        finally:
            await self._deltas.aclose()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        usage: Usage | None = None
        try:
            async for delta in self._deltas:
                if not begun:
                    begun = True
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await send(start)
                usage = delta.usage
                await send(_body(self._writer.chunk(delta)))
            if usage is not None and self._include_usage:
                await send(_body(self._writer.usage(usage)))
        except OSError:  # the server's word for a client that left in the middle of a write
            return
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            status, error = _error(exc)
            if not begun:
                await _json(error, status)(scope, receive, send)
                return
            await send(_body(event(error)))
        await send(_body(DONE))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _all(parts: list[Any], do: Callable[[int, Any], Awaitable[R]]) -> list[R]:
    """Do something with each part, all at once; the first error ends the others and is raised as itself."""
    results: dict[int, R] = {}
    failures: list[Exception] = []

    async def one(number: int, part: Any) -> None:
        try:
            results[number] = await do(number, part)
        except Exception as exc:  # noqa: BLE001 - raised below: the group would wrap it
            failures.append(exc)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for number, part in enumerate(parts):
            group.start_soon(one, number, part)
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(parts))]


# -- errors ----------------------------------------------------------------------------------------------------------


def _answering(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException as exc:
            if exc.status_code != _TOO_LARGE:  # 499: nobody is left to read it
                raise
            return _json(_error_body(exc.detail, "invalid_request_error", "too_large"), _TOO_LARGE)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the client is told
            status, error = _error(exc)
            return _json(error, status)

    return answer


class _Error(msgspec.Struct):
    message: str
    type: str
    code: str | None
    param: None = None


def _error(exc: Exception) -> tuple[int, bytes]:
    match exc:
        case _UnknownModel():
            return 404, _error_body(str(exc), "invalid_request_error", "model_not_found")
        case RequestQuarantined():  # for the client it is a request that must not be sent again, as 503 would be
            log.warning("openai.failed", error=str(exc))
            return 422, _error_body(str(exc), "invalid_request_error", type(exc).__name__)
        case RequestError():
            return 400, _error_body(str(exc), "invalid_request_error", None)
        case PoolBusy():
            return _BUSY, _error_body(str(exc), "rate_limit_error", "pool_busy")
        case EngineError() | MisuseError():  # lost, dead, closed or draining
            log.warning("openai.failed", error=str(exc))
            return 503, _error_body(str(exc), "server_error", type(exc).__name__)
        case _:
            log.error("openai.failed", exc_info=exc)
            return 500, _error_body("the server failed; its log has the cause", "server_error", None)


def _error_body(message: str, kind: str, code: str | None) -> bytes:
    return msgspec.json.encode({"error": _Error(message, kind, code)})


def _json(body: bytes, status: int = 200) -> Response:
    headers = {"retry-after": "1"} if status == _BUSY else None
    return Response(body, status, headers, "application/json")


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
