"""Between our messages and OpenAI's: requests become bodies of JSON, chunks of the answer deltas."""

from __future__ import annotations

import array
import base64
import json
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from actors.answers import Delta, Logprob, Usage
from actors.requests import is_chat
from arun.errors import EngineError, RequestError

if TYPE_CHECKING:
    from actors.engines.remote_http import RemoteOptions
    from actors.requests import GenerateRequest, Pooling, StructuredOutputs

__all__ = ("Answer", "Chunk", "body_of", "chunk_of", "embed_body_of", "embedding_of")

_OPENAI = ("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias")
"""Sampling parameters that are called the same in OpenAI's API."""

_VLLM = (
    "min_tokens",
    "top_k",
    "min_p",
    "stop_token_ids",
    "repetition_penalty",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "bad_words",
    "allowed_token_ids",
)
"""Those that only vLLM's server has, under the same names."""


def body_of(model: str, request: GenerateRequest, options: RemoteOptions) -> tuple[str, dict[str, Any]]:
    """The path below the API's base and the body of a request for a streamed answer.

    :raises RequestError: the server's API has no way to say it; names the parameter.
    """
    sampling, prompt = request.sampling, request.prompt
    given = sampling.given()
    chat = is_chat(prompt) or (isinstance(prompt, str) and options.text_as == "chat")
    body: dict[str, Any] = {"model": _model(model, request, options)}
    if chat:
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        body["messages"] = msgspec.to_builtins(messages)
        if (max_tokens := given.pop("max_tokens")) is not None:
            body[options.max_tokens_name] = max_tokens
    else:
        if sampling.max_tokens is None and options.dialect != "vllm":
            raise RequestError("max_tokens=None: a completion of OpenAI's API has 16 then; say how many, or ask a chat")
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        body["max_tokens"] = given.pop("max_tokens")
    body |= _chat_options(request, options)
    for name in _OPENAI:
        if name in given:
            body[name] = given.pop(name)
    if "logprobs" in given:
        body |= _logprobs(given.pop("logprobs"), chat=chat)
    if "structured_outputs" in given:
        body |= _structured(given.pop("structured_outputs"), options, chat=chat)
    if options.dialect == "vllm":
        for name in _VLLM:
            if name in given:
                body[name] = given.pop(name)
    if given:
        raise RequestError(f"{', '.join(given)}: {_no_such(options)}")
    return (
        "/chat/completions" if chat else "/completions",
        {**body, "stream": True, "stream_options": {"include_usage": True}, **options.extra_body},
    )


def embed_body_of(model: str, request: GenerateRequest, pooling: Pooling, options: RemoteOptions) -> dict[str, Any]:
    """The body of a request for an embedding.

    :raises RequestError: the server's API has no way to say it.
    """
    prompt = request.prompt
    if is_chat(prompt):
        raise RequestError("a remote engine embeds text or token ids, not chat messages")
    body: dict[str, Any] = {"model": model, "input": prompt if isinstance(prompt, str) else list(prompt)}
    if pooling.dimensions is not None:
        body["dimensions"] = pooling.dimensions
    if pooling.normalize is not None:
        if options.dialect != "vllm":
            raise RequestError(f"normalize: {_no_such(options)}")
        body["normalize"] = pooling.normalize
    return {**body, "encoding_format": "base64", **options.extra_body}


# -- answers ---------------------------------------------------------------------------------------------------------


class _TopToken(msgspec.Struct):
    token: str
    logprob: float


class _Token(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_TopToken] = []


class _Logprobs(msgspec.Struct):
    """Of a chat ``content``, of a completion the rest."""

    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    """Of a chat ``delta``, of a completion ``text``."""

    index: int = 0
    delta: _Message | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | float | None = None


class _Usage(msgspec.Struct):
    """What a server counts; null where it doesn't, and some write whole numbers as fractions."""

    prompt_tokens: int | float | None = None
    completion_tokens: int | float | None = None
    prompt_tokens_details: _Details | None = None

    def counted(self) -> Usage:
        details = self.prompt_tokens_details
        cached = details.cached_tokens if details else None
        return Usage(int(self.prompt_tokens or 0), int(self.completion_tokens or 0), int(cached or 0))


class Chunk(msgspec.Struct):
    """One event of a streamed answer."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


def chunk_of(data: str) -> Chunk:
    """Read one event.

    :raises ValueError: it is no chunk of an answer.
    """
    try:
        return msgspec.json.decode(data, type=Chunk)
    except msgspec.DecodeError:
        # Some servers cut a character beyond U+FFFF in two; each half becomes U+FFFD, as of text that is no UTF-8.
        text = json.dumps(json.loads(data), ensure_ascii=False)
        return msgspec.json.decode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"), type=Chunk)


class Answer:
    """Turns the chunks of one answer into deltas.

    OpenAI sends the usage after the last choice has ended, and our last delta has it: so the deltas that end a choice
    are held back until the next one comes, or the end.

    :param n: how many choices there are.
    """

    def __init__(self, n: int) -> None:
        self._open = set(range(n))
        self._last: Delta | None = None
        self._usage: Usage | None = None
        self.count = 0

    @property
    def complete(self) -> bool:
        """Whether every choice has ended."""
        return not self._open

    def deltas(self, chunk: Chunk) -> list[Delta]:
        """What a chunk makes ready to be delivered.

        :raises EOFError: the server gave up on it.
        """
        if chunk.usage is not None:
            self._usage = chunk.usage.counted()
        ready: list[Delta] = []
        for choice in chunk.choices or ():
            delta = _delta(choice)
            if delta.finish_reason is not None:
                self._open.discard(choice.index)
                if self._last is not None:
                    ready.append(self._last)
                self._last = delta
            elif delta.text or delta.logprobs:
                ready.append(delta)
        self.count += len(ready)
        return ready

    def last(self) -> Delta:
        """The last delta, when all has come; its usage counts nothing where the server tells none."""
        assert self._last is not None  # complete
        return msgspec.structs.replace(self._last, usage=self._usage or Usage(0, 0))


class _Vector(msgspec.Struct):
    embedding: str | list[float]


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage | None = None


def embedding_of(body: bytes) -> Delta:
    """The answer to a request for an embedding.

    :raises EngineError: it is none.
    """
    try:
        answer = msgspec.json.decode(body, type=_Embeddings)
        (vector,) = answer.data
        data = vector.embedding
        packed = base64.b64decode(data, validate=True) if isinstance(data, str) else _packed(data)
    except (ValueError, RecursionError) as exc:
        raise EngineError(f"the server's answer is no embedding: {exc}") from exc
    return Delta(usage=answer.usage.counted() if answer.usage else Usage(0, 0), embedding=packed)


def _packed(vector: list[float]) -> bytes:
    floats = array.array("f", vector)
    if sys.byteorder == "big":
        floats.byteswap()
    return floats.tobytes()


def _delta(choice: _Choice) -> Delta:
    if choice.finish_reason == "abort":  # vLLM's server, when it is told to end
        raise EOFError("the server aborted it")
    text = choice.text or ""
    if choice.delta is not None:
        text = choice.delta.content or choice.delta.refusal or ""
    return Delta(
        text,
        index=choice.index,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        logprobs=None if choice.logprobs is None else _positions(choice.logprobs),
    )


_UNKNOWN_ID = -1
"""The id of a token that the server tells the text of only."""


def _positions(logprobs: _Logprobs) -> list[list[Logprob]] | None:
    if logprobs.content is not None:
        return [_position(each.token, each.logprob, [(top.token, top.logprob) for top in each.top_logprobs])
                for each in logprobs.content]  # fmt: skip
    if logprobs.tokens is None:
        return None
    count = len(logprobs.tokens)
    own = logprobs.token_logprobs or [None] * count
    tops = logprobs.top_logprobs or [None] * count
    return [
        _position(token, logprob if logprob is not None else 0.0, list((top or {}).items()))
        for token, logprob, top in zip(logprobs.tokens, own, tops, strict=False)
    ]


def _position(token: str, logprob: float, top: list[tuple[str, float]]) -> list[Logprob]:
    ranks = {text: rank for rank, (text, _) in enumerate(sorted(top, key=lambda each: -each[1]), 1)}
    rest = [Logprob(_UNKNOWN_ID, value, ranks[text], text) for text, value in top if text != token]
    return [Logprob(_UNKNOWN_ID, logprob, ranks.get(token), token), *rest]


# -- requests --------------------------------------------------------------------------------------------------------


def _model(model: str, request: GenerateRequest, options: RemoteOptions) -> str:
    if request.adapter is None:
        return model
    if options.dialect != "vllm":
        raise RequestError(f"adapter: {_no_such(options)}")
    return request.adapter  # vLLM's server has adapters as models


def _chat_options(request: GenerateRequest, options: RemoteOptions) -> dict[str, Any]:
    chat = request.chat
    if chat is None:
        return {}
    if chat.tools:
        raise RequestError("tools: a remote engine's deltas have no place for the calls that a server makes of them")
    given: dict[str, Any] = msgspec.to_builtins(chat)
    if given and options.dialect != "vllm":
        raise RequestError(f"{', '.join(given)}: {_no_such(options)}")
    return {**given, "add_generation_prompt": False} if chat.continue_final_message else given


def _logprobs(most: int, *, chat: bool) -> dict[str, Any]:
    if most < 0:
        raise RequestError("logprobs=-1: OpenAI's API takes a number of tokens, 0 or more")
    return {"logprobs": True, "top_logprobs": most} if chat else {"logprobs": most}


def _structured(wanted: StructuredOutputs, options: RemoteOptions, *, chat: bool) -> dict[str, Any]:
    if options.dialect == "vllm":
        return {"structured_outputs": msgspec.to_builtins(wanted)}
    if not chat:
        raise RequestError(
            "structured_outputs: OpenAI's API has them for chats only; give chat messages, or "
            "engine_args={'text_as': 'chat'}"
        )
    if wanted.json_object:
        return {"response_format": {"type": "json_object"}}
    if wanted.json is None:
        (name,) = msgspec.to_builtins(wanted)
        raise RequestError(f"structured_outputs {name!r}: {_no_such(options)}")
    try:
        schema = msgspec.json.decode(wanted.json) if isinstance(wanted.json, str) else wanted.json
    except msgspec.DecodeError as exc:
        raise RequestError(f"structured_outputs: the JSON schema is no JSON: {exc}") from None
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def _no_such(options: RemoteOptions) -> str:
    if options.dialect == "vllm":
        return "vLLM's server takes no such parameter with a streamed answer"
    return "OpenAI's API has no such parameter; if the server is vLLM's or arun's, say engine_args={'dialect': 'vllm'}"
