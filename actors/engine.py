"""The Engine protocol, what an engine is made from, and the actor that holds one.

    request (GenerateRequest)  ->  Engine.generate  ->  deltas (Delta), the last one with finish_reason and Usage

The messages are in ``actors.requests`` and ``actors.answers``; everything that routes, queues or counts requests
is testable against them alone. An engine is any class with the methods of :class:`Engine`, made from an
:class:`EngineSpec` in the process that runs it.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Literal, Protocol

import anyio
import msgspec

from actors.actor import method
from actors.answers import Choice, Completion, Delta, Embedding, Logprob, Reset, Usage
from actors.environment import check_environment
from actors.requests import (
    ChatMessage,
    ChatOptions,
    GenerateRequest,
    Lane,
    Pooling,
    Prompt,
    PromptLike,
    RequestOptions,
    Sampling,
    SamplingOptions,
    StructuredOutputs,
    is_chat,
    is_tokens,
    to_embed_request,
    to_prompt,
    to_request,
)
from arun.errors import EngineError, MisuseError
from arun.logs import get_logger

__all__ = (
    "ChatMessage",
    "ChatOptions",
    "Choice",
    "Completion",
    "Delta",
    "Embedding",
    "Engine",
    "EngineActor",
    "EngineInfo",
    "EngineLoad",
    "EngineMetrics",
    "EngineSpec",
    "GenerateRequest",
    "Lane",
    "Logprob",
    "Outcome",
    "Pooling",
    "Prompt",
    "PromptLike",
    "Pulse",
    "RequestOptions",
    "Reset",
    "Sampling",
    "SamplingOptions",
    "StructuredOutputs",
    "Tally",
    "Usage",
    "is_chat",
    "is_tokens",
    "to_embed_request",
    "to_prompt",
    "to_request",
)

log = get_logger("arun.engine")

Outcome = Literal["finished", "failed", "aborted"]

_ENGINES = frozenset({"vllm", "remote", "echo"})
_USE = "use 'vllm', 'remote', 'echo', or a class with Engine's methods"


class EngineLoad(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What an engine is doing and has done.

    :ivar in_flight: requests that hold something in the engine now.
    :ivar tokens: generated since the start.
    """

    in_flight: int = 0
    started: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    tokens: int = 0


class Pulse(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A sign of life of an engine.

    :ivar in_flight: requests that it has, of whatever client.
    :ivar tokens: generated since the start.
    """

    in_flight: int
    tokens: int


class Tally:
    """Counts an engine's requests and tokens; every request ends in exactly one :meth:`end`."""

    __slots__ = ("ended", "started", "tokens")

    def __init__(self) -> None:
        self.started = 0
        self.tokens = 0
        self.ended: dict[Outcome, int] = {"finished": 0, "failed": 0, "aborted": 0}

    def begin(self) -> None:
        self.started += 1

    def end(self, outcome: Outcome) -> None:
        self.ended[outcome] += 1

    def load(self) -> EngineLoad:
        """The counts as they are now."""
        in_flight = self.started - sum(self.ended.values())
        return EngineLoad(in_flight=in_flight, started=self.started, tokens=self.tokens, **self.ended)


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An engine's own view of its work; counts are since its start.

    :ivar running: requests in the current batch; each answer of ``n`` counts.
    :ivar waiting: requests that the scheduler has not started.
    :ivar kv_cache_usage: share of the KV cache that is taken, 0 to 1.
    :ivar prefix_queries: prompt tokens that were looked up in the prefix cache.
    :ivar prefix_hits: those of them that were there.
    :ivar preemptions: requests put back because the KV cache was full.
    :ivar prompt_tokens: read, those from the prefix cache included.
    :ivar completion_tokens: generated.
    """

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine's actor knows about itself.

    :ivar pid: of the actor's process.
    :ivar start_seconds: how long the engine took to start.
    :ivar resumes: whether the engine heeds ``GenerateRequest.resume``.
    """

    pid: int
    model: str
    start_seconds: float
    load: EngineLoad
    resumes: bool = False


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine to make, with which model, over how many workers.

    :ivar model: a folder, a name on the Hugging Face hub, ``"tiny"`` or ``"demo"`` (see :mod:`actors.models`); of a
        remote engine, the server's name for it.
    :ivar engine: ``"vllm"``, ``"remote"``, ``"echo"``, or a class with the methods of :class:`Engine` made from this
        spec.
    :ivar tensor_parallel_size: workers that share each layer.
    :ivar pipeline_parallel_size: groups of such workers that share the layers between them.
    :ivar max_model_len: most tokens of prompt and answer together; None takes the model's own.
    :ivar engine_args: passed on by name: to vLLM's AsyncEngineArgs, or the options of RemoteEngine or EchoEngine.
    :ivar env: environment variables of the engine's process.
    :ivar runner: ``"generate"`` for answers, ``"pooling"`` for embeddings.
    :ivar adapters: LoRA adapters by the name that requests give; folders with ``adapter_config.json``.
    """

    model: str
    engine: str | type = "vllm"
    runner: Literal["generate", "pooling"] = "generate"
    adapters: dict[str, str] = {}
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    engine_args: dict[str, Any] = {}
    env: dict[str, str] = {}

    @property
    def workers(self) -> int:
        """Worker processes of one engine: tensor parallel times pipeline parallel."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def validate(self) -> None:
        """Refuse what cannot work on any machine.

        :raises MisuseError: an unknown engine, a size below 1, or an ``env`` that is not all text.
        """
        if not isinstance(self.model, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"model is {self.model!r}; it must be text: a folder, or a name on the hub")
        if isinstance(self.engine, type) and not hasattr(self.engine, "generate"):
            raise MisuseError(f"{self.engine.__qualname__} has no generate(), so it is no engine; {_USE}")
        if isinstance(self.engine, str) and self.engine not in _ENGINES:
            raise MisuseError(f"there is no engine {self.engine!r}; {_USE}")
        if self.runner not in {"generate", "pooling"}:
            raise MisuseError(f"runner is {self.runner!r}; it must be 'generate' or 'pooling'")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise MisuseError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise MisuseError(f"max_model_len is {self.max_model_len}; a prompt and its answer need at least 2 tokens")
        check_environment(self.env)


class Engine(Protocol):
    """What an engine does. It is made as ``cls(spec)`` in the process that runs it.

    It may also have ``metrics() -> EngineMetrics``, ``async sleep(level)``, ``async wake()``, and ``resumes = True``
    if it goes on after the tokens in ``request.resume``, so that a pool may hand it the answer of a lost replica.
    """

    async def start(self) -> None:
        """Load the model. :raises EngineError: with the cause in one sentence."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream the answer. Closing or cancelling the generator aborts the request, and its clean-up is awaited.

        :raises RequestError: this request cannot be served; the engine goes on.
        :raises EngineDead: the engine failed, this request and all others with it.
        :raises ReplicaLost: only this answer broke off; a pool begins it anew where that was asked for.
        """
        ...

    async def check_health(self) -> None:
        """Return when the engine can serve. :raises EngineDead: it can't any more."""

    def load(self) -> EngineLoad:
        """Counters; cheap, at any time after start.

        A pool hears ``tokens`` regularly. An engine that gives answers whole, as ``request.whole`` allows, counts them
        while it makes them, else a pool takes it for hung.
        """
        ...

    async def stop(self) -> None:
        """End every request and every process of the engine. Idempotent, also after a start that failed."""


def make_engine(spec: EngineSpec) -> Engine:
    """Make the engine that ``spec`` names; imports what it needs here and not earlier."""
    match spec.engine:
        case "vllm":
            from actors.vllm_engine import VLLMEngine

            return VLLMEngine(spec)
        case "remote":
            from actors.remote_engine import RemoteEngine

            return RemoteEngine(spec)
        case "echo":
            from actors.echo_engine import EchoEngine

            return EchoEngine(spec)
        case str() as name:
            raise MisuseError(f"there is no engine {name!r}; {_USE}")
        case engine_class:
            engine: Engine = engine_class(spec)
            return engine


class EngineActor:
    """The actor class that holds one engine, made from its spec in the actor's own process."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._engine = make_engine(spec)
        self._start_seconds = 0.0
        self._in_flight = 0

    async def on_start(self) -> None:
        began = time.monotonic()
        try:
            await self._engine.start()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._engine.stop()
            raise
        self._start_seconds = time.monotonic() - began
        log.info("engine.started", model=self._spec.model, seconds=round(self._start_seconds, 1))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        deltas = self._engine.generate(request)
        epoch, told = request.epoch, 0
        self._in_flight += 1
        try:
            async for delta in deltas:
                if epoch or told != self._in_flight:
                    told = self._in_flight
                    delta = msgspec.structs.replace(delta, epoch=epoch, load=told)
                yield delta
        finally:
            self._in_flight -= 1
            await deltas.aclose()

    async def pulse(self, seconds: float) -> AsyncIterator[Pulse]:
        """A sign of life now and every so many seconds. :raises EngineDead: the engine can't serve any more."""
        while True:
            await self._engine.check_health()
            yield Pulse(self._in_flight, self._engine.load().tokens)
            await anyio.sleep(seconds)

    @method(idempotent=True)
    async def info(self) -> EngineInfo:
        resumes = bool(getattr(self._engine, "resumes", False))
        return EngineInfo(os.getpid(), self._spec.model, self._start_seconds, self._engine.load(), resumes)

    @method(idempotent=True)
    async def metrics(self) -> EngineMetrics:
        metrics: EngineMetrics = self._optional("metrics")()
        return metrics

    async def sleep(self, level: int = 1) -> None:
        await self._optional("sleep")(level)

    async def wake(self) -> None:
        await self._optional("wake")()

    async def on_stop(self) -> None:
        await self._engine.stop()

    def _optional(self, name: str) -> Any:
        method = getattr(self._engine, name, None)
        if method is None:
            raise EngineError(f"{type(self._engine).__name__} has no {name}()")
        return method
