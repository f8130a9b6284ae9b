"""RemoteEngine: the Engine protocol over an OpenAI-compatible HTTP server, a hosted model included.

>>> spec = EngineSpec(
...     model="gpt-4.1-mini",
...     engine="remote",
...     engine_args={"base_url": "https://api.openai.com/v1", "api_key_env": "OPENAI_API_KEY"},
... )
>>> async with LocalCluster().engines(spec) as pool:
...     (await pool.complete([{"role": "user", "content": "Hello"}])).text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
import msgspec

from actors.engine import Delta, EngineLoad, EngineSpec, GenerateRequest, Outcome, Tally
from actors.engines.remote_http import RemoteOptions, Server, import_httpx2, read_error
from actors.engines.remote_requests import Answer, body_of, chunk_of, embed_body_of, embedding_of
from arun.errors import EngineDead, EngineError, MisuseError, ReplicaLost, RequestError
from arun.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import httpx2

__all__ = ("RemoteEngine", "RemoteOptions")

log = get_logger("arun.engine")

_MAX_EVENT = 64 * 2**20
"""Bytes: what a channel takes as one item."""


class RemoteEngine:
    """Sends requests to a server that speaks OpenAI's API and streams its answers.

    A server tells no token ids, so its deltas have none, and nobody can go on with an answer that breaks off: it fails
    with ReplicaLost, or begins anew where ``reroute="restart"`` was asked for. A request that has no answer yet is sent
    again while the server is busy, failing or out of reach, so an outage of it never ends the engine.

    :param spec: its ``engine_args`` are ``RemoteOptions``, its ``model`` is the server's name for it.
    :raises MisuseError: an unknown option, a value of the wrong type, or a size that only engines of ours have.
    """

    def __init__(self, spec: EngineSpec) -> None:
        try:
            self._options = msgspec.convert(spec.engine_args, RemoteOptions)
        except msgspec.ValidationError as exc:
            known = ", ".join(RemoteOptions.__struct_fields__)
            raise MisuseError(f"engine_args of the remote engine: {exc}; known are {known}") from None
        if spec.workers > 1 or spec.max_model_len is not None:
            raise MisuseError(
                "tensor_parallel_size, pipeline_parallel_size and max_model_len are the server's to choose; leave them "
                "out with engine='remote'"
            )
        self._spec = spec
        self._tally = Tally()
        self._server: Server | None = None

    async def start(self) -> None:
        """Connect once, so that a wrong address or key is told now."""
        self._server = server = Server(self._options)
        models = await server.models()
        if models is not None and self._spec.model not in models:  # aliases are listed by few servers
            log.warning("remote.model_not_listed", url=server.url, model=self._spec.model, listed=models[:20])

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._tally.begin()
        outcome: Outcome = "aborted"
        deltas = self._answers(request) if request.pooling is None else self._embeds(request)
        try:
            async for delta in deltas:
                if delta.usage is not None:
                    self._tally.tokens += delta.usage.completion_tokens
                    outcome = "finished"
                yield delta
        except EngineError:
            outcome = "failed"
            raise
        finally:
            self._tally.end(outcome)
            with anyio.CancelScope(shield=True):
                await deltas.aclose()

    async def check_health(self) -> None:
        """A server that is out of reach is not the engine's end: each request finds out, and tries again."""
        self._connected()

    def load(self) -> EngineLoad:
        return self._tally.load()

    async def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            with anyio.CancelScope(shield=True):
                await server.aclose()

    async def _answers(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        server = self._connected()
        path, body = body_of(self._spec.model, request, self._options)
        encoded = msgspec.json.encode(body)
        broken: type[Exception] = import_httpx2().RequestError
        for attempt in range(1, self._options.attempts + 1):
            answer = Answer(request.sampling.n)
            response = await server.send("POST", path, encoded)
            deltas = self._stream(server, response, answer)
            try:
                async for delta in deltas:
                    yield delta
                return
            except (broken, EOFError) as exc:
                if answer.count:
                    raise ReplicaLost(
                        f"the answer of {server.url} broke off after {answer.count} deltas: {server.clean(exc)}. "
                        "The server tells no token ids, so nobody can go on with it; ask again, or with "
                        "reroute='restart', which begins anew"
                    ) from exc
                if attempt == self._options.attempts:
                    raise EngineError(
                        f"{server.url} broke off {attempt} answers before their first delta: {server.clean(exc)}"
                    ) from exc
            finally:
                with anyio.CancelScope(shield=True):
                    await deltas.aclose()
                    await response.aclose()

    async def _stream(self, server: Server, response: httpx2.Response, answer: Answer) -> AsyncGenerator[Delta, None]:
        kind = response.headers.get("content-type", "none")
        if not kind.lower().startswith("text/event-stream"):  # to ask again would give the same, and cost the same
            body = await server.text(response)
            raise EngineError(f"{server.url} was asked for a stream and answered with {kind}: {body[:500]}")
        response.encoding = "utf-8-sig"  # that of events, whatever the header says; some begin with a byte order mark
        events = aiter(import_httpx2().EventSource(response, _MAX_EVENT))
        try:
            async for event in events:
                data = event.data.strip()
                if data == "[DONE]":
                    break
                if not data:  # a sign of life
                    continue
                if event.event == "error":
                    raise _told(server, event.data)
                try:
                    chunk = chunk_of(data)
                except (ValueError, RecursionError) as exc:
                    raise EngineError(f"{server.url} sent what is no chunk of an answer: {exc}") from exc
                if chunk.error is not None:
                    raise _told(server, event.data)
                for delta in answer.deltas(chunk):
                    yield delta
        finally:
            await events.aclose()
        if not answer.complete:
            raise EOFError("the stream ended without a finish_reason")
        yield answer.last()

    async def _embeds(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        server = self._connected()
        assert request.pooling is not None  # else it is not asked
        body = embed_body_of(self._spec.model, request, request.pooling, self._options)
        response = await server.send("POST", "/embeddings", msgspec.json.encode(body))
        try:
            data = await response.aread()
        except import_httpx2().RequestError as exc:
            raise EngineError(f"the answer of {server.url} broke off: {server.clean(exc)}") from exc
        finally:
            with anyio.CancelScope(shield=True):
                await response.aclose()
        yield embedding_of(data)

    def _connected(self) -> Server:
        if self._server is None:
            raise EngineDead("the remote engine does not run: it was not started, or was stopped")
        return self._server


def _told(server: Server, event: str) -> EngineError:
    """The error that a server sends in the middle of a stream."""
    error = read_error(server.clean(event))
    kind = RequestError if error.type == "invalid_request_error" or error.code == 400 else EngineError
    return kind(f"{server.url} broke off its answer: {error.message}")
