"""The messages of an inference engine, the Engine protocol, and the actor that holds an engine.

    request (GenerateRequest)  ->  Engine.generate  ->  deltas (Delta), the last one with finish_reason and Usage

Messages first; everything that routes, queues or counts requests is testable against them alone. An engine is any
class with the five methods of :class:`Engine`, made from an :class:`EngineSpec` in the process that runs it.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypedDict, TypeGuard

import anyio
import msgspec

from arun.errors import MisuseError, RequestError
from arun.logs import get_logger

__all__ = (
    "ChatMessage",
    "Completion",
    "Delta",
    "Engine",
    "EngineActor",
    "EngineInfo",
    "EngineLoad",
    "EngineSpec",
    "GenerateRequest",
    "Lane",
    "Outcome",
    "Prompt",
    "PromptLike",
    "Sampling",
    "SamplingOptions",
    "Tally",
    "Usage",
    "is_chat",
    "is_tokens",
    "to_prompt",
)

log = get_logger("arun.engine")

Lane = Literal["interactive", "batch"]
Outcome = Literal["finished", "failed", "aborted"]


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a chat.

    :ivar role: ``"system"``, ``"user"`` or ``"assistant"``, as the model's chat template has them.
    """

    role: str
    content: str


# Text, token ids, or the turns of a chat. One sequence type, because msgspec allows one array in a union;
# is_tokens() and is_chat() tell the two apart.
Prompt = str | Sequence[int | ChatMessage]

# What a user may write for it.
PromptLike = Prompt | Sequence[Mapping[str, str]]


def is_tokens(prompt: Prompt) -> TypeGuard[Sequence[int]]:
    """Whether ``prompt`` is a list of token ids."""
    return not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt)


def is_chat(prompt: Prompt) -> TypeGuard[Sequence[ChatMessage]]:
    """Whether ``prompt`` is a list of chat messages."""
    return bool(prompt) and not isinstance(prompt, str) and all(isinstance(part, ChatMessage) for part in prompt)


def to_prompt(prompt: PromptLike) -> Prompt:
    """Check a prompt as a user gives it; messages may be dicts.

    :raises RequestError: it is empty, or neither text, nor token ids, nor chat messages.
    """
    try:
        checked = msgspec.convert(prompt, Prompt)
    except msgspec.ValidationError as exc:
        raise RequestError(f"a prompt is text, a list of token ids or a list of chat messages: {exc}") from None
    if not checked:
        raise RequestError("the prompt is empty")
    if not (isinstance(checked, str) or is_tokens(checked) or is_chat(checked)):
        raise RequestError("the prompt has both token ids and chat messages; give a list of either")
    return checked


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop; names and meanings are those of vLLM's SamplingParams.

    ``None`` means the model's own default (its generation_config.json), else vLLM's.

    :ivar max_tokens: most tokens to generate.
    :ivar min_tokens: tokens to generate before an end-of-sequence or stop string counts.
    :ivar temperature: 0 is greedy.
    :ivar top_k: 0 or -1 considers all tokens.
    :ivar seed: of this request's own random generator.
    :ivar stop: strings that end the answer; they are not part of it unless ``include_stop_str_in_output``.
    :ivar ignore_eos: go on to ``max_tokens``.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 16
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Sampling:
        """Check options given by name; those that are None count as not given.

        :raises RequestError: an unknown name (the message has the nearest known one) or a value out of range.
        """
        for name in options:
            if name not in cls.__struct_fields__:
                near = difflib.get_close_matches(name, cls.__struct_fields__, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(cls.__struct_fields__)}"
                raise RequestError(f"there is no sampling parameter {name!r}; {hint}")
        try:
            return msgspec.convert({name: value for name, value in options.items() if value is not None}, cls)
        except msgspec.ValidationError as exc:
            raise RequestError(f"sampling parameters: {exc}") from None

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, and ``max_tokens``, by name."""
        return {
            field.name: value
            for field in msgspec.structs.fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name == "max_tokens"
        }


class SamplingOptions(TypedDict, total=False):
    """The fields of :class:`Sampling` besides max_tokens and temperature, as keyword arguments."""

    min_tokens: int | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    ignore_eos: bool
    skip_special_tokens: bool
    include_stop_str_in_output: bool


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask an engine to continue ``prompt``.

    :ivar request_id: unique among the requests that an engine has at one time.
    :ivar prompt: text, token ids (``list[int]``, length < max_model_len) or chat messages.
    :ivar lane: ``"interactive"`` goes before ``"batch"`` where the engine schedules by priority.
    :ivar priority: within a lane, lower goes first.
    """

    request_id: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    lane: Lane = "interactive"
    priority: int = 0


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What an engine generated since the last delta of the same request.

    :ivar text: may be empty while a character or a possible stop string is incomplete.
    :ivar token_ids: ``list[int]``, the new tokens; all deltas together are at most ``max_tokens`` long.
    :ivar index: which of several answers to one prompt.
    :ivar finish_reason: None until the last delta, then ``"stop"`` (end of sequence or stop string),
        ``"length"`` (max_tokens or the model's context is full) or ``"abort"``.
    :ivar usage: on the last delta.
    """

    text: str = ""
    token_ids: list[int] = []
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer.

    :ivar token_ids: ``list[int]``, length ``usage.completion_tokens``.
    :ivar time_to_first_token: seconds from the call to the first delta, waiting for admission included.
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None
    usage: Usage
    time_to_first_token: float | None


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


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine's actor knows about itself.

    :ivar pid: of the actor's process.
    :ivar start_seconds: how long the engine took to start.
    """

    pid: int
    model: str
    start_seconds: float
    load: EngineLoad


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which engine to make, with which model, over how many workers.

    :ivar model: a folder, a name on the Hugging Face hub, ``"tiny"`` or ``"demo"`` (see :mod:`actors.models`).
    :ivar engine: ``"vllm"``, ``"echo"``, or a class with the methods of :class:`Engine` made from this spec.
    :ivar tensor_parallel_size: workers that share each layer.
    :ivar pipeline_parallel_size: groups of such workers that share the layers between them.
    :ivar max_model_len: most tokens of prompt and answer together; None takes the model's own.
    :ivar engine_args: passed on by name: to vLLM's AsyncEngineArgs, or EchoEngine's options.
    :ivar env: environment variables of the engine's process.
    """

    model: str
    engine: str | type = "vllm"
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

        :raises MisuseError: an unknown engine, or a size below 1.
        """
        if isinstance(self.engine, str) and self.engine not in {"vllm", "echo"}:
            raise MisuseError(
                f"there is no engine {self.engine!r}; use 'vllm', 'echo', or a class with Engine's methods"
            )
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise MisuseError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise MisuseError(f"max_model_len is {self.max_model_len}; a prompt and its answer need at least 2 tokens")


class Engine(Protocol):
    """What an engine does. It is made as ``cls(spec)`` in the process that runs it."""

    async def start(self) -> None:
        """Load the model. :raises EngineError: with the cause in one sentence."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """Stream the answer. Closing or cancelling the generator aborts the request, and its clean-up is awaited.

        :raises RequestError: this request cannot be served; the engine goes on.
        :raises EngineDead: the engine failed, this request and all others with it.
        """
        ...

    async def check_health(self) -> None:
        """Return when the engine can serve. :raises EngineDead: it can't any more."""

    def load(self) -> EngineLoad:
        """Counters; cheap, at any time after start."""
        ...

    async def stop(self) -> None:
        """End every request and every process of the engine. Idempotent, also after a start that failed."""


def make_engine(spec: EngineSpec) -> Engine:
    """Make the engine that ``spec`` names; imports what it needs here and not earlier."""
    match spec.engine:
        case "vllm":
            from actors.vllm_engine import VLLMEngine

            return VLLMEngine(spec)
        case "echo":
            from actors.echo_engine import EchoEngine

            return EchoEngine(spec)
        case str() as name:
            raise MisuseError(f"there is no engine {name!r}; use 'vllm', 'echo', or a class with Engine's methods")
        case engine_class:
            engine: Engine = engine_class(spec)
            return engine


class EngineActor:
    """The actor class that holds one engine, made from its spec in the actor's own process."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._engine = make_engine(spec)
        self._start_seconds = 0.0

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
        try:
            async for delta in deltas:
                yield delta
        finally:
            await deltas.aclose()

    async def health(self) -> None:
        await self._engine.check_health()

    async def info(self) -> EngineInfo:
        return EngineInfo(os.getpid(), self._spec.model, self._start_seconds, self._engine.load())

    async def on_stop(self) -> None:
        await self._engine.stop()
