"""What clients are sent: OpenAI's objects, and the chunks that they come in when streamed."""

from __future__ import annotations

import base64
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from arun.web.openai.backend import Choice, Delta, Embedding, Logprob, Usage

__all__ = ("DONE", "ChatWriter", "CompletionWriter", "embeddings", "event", "usage_of")

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class _TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class _TokenLogprob(_TopLogprob):
    top_logprobs: list[_TopLogprob]


class _ChatLogprobs(msgspec.Struct):
    content: list[_TokenLogprob]
    refusal: None = None


class _CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []


class _PromptDetails(msgspec.Struct):
    cached_tokens: int


class _Usage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: list[Any]
    usage: _Usage | None = None


class _Message(msgspec.Struct):
    role: str
    content: str
    refusal: None = None


class _ChatChoice(msgspec.Struct):
    index: int
    message: _Message
    logprobs: _ChatLogprobs | None
    finish_reason: str | None


class _ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class _ChatChunkChoice(msgspec.Struct):
    index: int
    delta: _ChatDelta
    logprobs: _ChatLogprobs | None
    finish_reason: str | None


class _CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: _CompletionLogprobs | None
    finish_reason: str | None


class _Writer(ABC):
    """Writes the answers to one request."""

    whole: str
    piece: str

    def __init__(self, request_id: str, model: str) -> None:
        self._id = request_id
        self._model = model
        self._created = int(time.time())

    def answer(self, choices: list[Choice], usages: Sequence[Usage]) -> bytes:
        """All of it at once."""
        return self._write(self.whole, [self._choice(choice) for choice in choices], usages)

    def chunk(self, delta: Delta) -> bytes:
        """One delta as an event."""
        return event(self._write(self.piece, [self._chunk(delta)]))

    def usage(self, usage: Usage) -> bytes:
        """The event that tells the usage, after the last delta."""
        return event(self._write(self.piece, [], [usage]))

    def _write(self, kind: str, choices: list[Any], usages: Sequence[Usage] = ()) -> bytes:
        usage = usage_of(usages) if usages else None
        return _encode(
            _Answer(id=self._id, object=kind, created=self._created, model=self._model, choices=choices, usage=usage)
        )

    @abstractmethod
    def _choice(self, choice: Choice) -> Any:
        """A whole answer, as this endpoint writes it."""

    @abstractmethod
    def _chunk(self, delta: Delta) -> Any:
        """A piece of one."""


class ChatWriter(_Writer):
    """Writes ``chat.completion``."""

    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, top: int) -> None:
        super().__init__(request_id, model)
        self._top = top
        self._begun: set[int] = set()

    def _choice(self, choice: Choice) -> _ChatChoice:
        message = _Message("assistant", choice.text)
        return _ChatChoice(choice.index, message, self._logprobs(choice), choice.finish_reason)

    def _chunk(self, delta: Delta) -> _ChatChunkChoice:
        role = None if delta.index in self._begun else "assistant"
        self._begun.add(delta.index)
        return _ChatChunkChoice(delta.index, _ChatDelta(role, delta.text), self._logprobs(delta), delta.finish_reason)

    def _logprobs(self, choice: Choice) -> _ChatLogprobs | None:
        if choice.logprobs is None:
            return None
        return _ChatLogprobs([
            _TokenLogprob(*_parts(tokens[0]), [_TopLogprob(*_parts(top)) for top in _most_likely(tokens, self._top)])
            for tokens in choice.logprobs
        ])


class CompletionWriter(_Writer):
    """Writes ``text_completion``."""

    whole = piece = "text_completion"

    def __init__(self, request_id: str, model: str, top: int) -> None:
        super().__init__(request_id, model)
        self._top = top
        self._offsets: dict[int, int] = {}

    def _choice(self, choice: Choice) -> _CompletionChoice:
        return _CompletionChoice(choice.index, choice.text, self._logprobs(choice), choice.finish_reason)

    def _chunk(self, delta: Delta) -> _CompletionChoice:
        return self._choice(delta)

    def _logprobs(self, choice: Choice) -> _CompletionLogprobs | None:
        if choice.logprobs is None:
            return None
        told = _CompletionLogprobs([], [], [], [])
        for tokens in choice.logprobs:
            text = _text(tokens[0])
            offset = self._offsets.get(choice.index, 0)
            told.tokens.append(text)
            told.token_logprobs.append(tokens[0].logprob)
            told.top_logprobs.append({_text(top): top.logprob for top in _most_likely(tokens, self._top)})
            told.text_offset.append(offset)
            self._offsets[choice.index] = offset + len(text)
        return told


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    model: str
    usage: _EmbeddingUsage
    object: str = "list"


def embeddings(model: str, vectors: Sequence[Embedding], *, as_base64: bool) -> bytes:
    """The vectors of one request."""
    tokens = sum(vector.prompt_tokens for vector in vectors)
    data = [
        _Vector(index, base64.b64encode(vector.data).decode() if as_base64 else vector.vector)
        for index, vector in enumerate(vectors)
    ]
    return _encode(_Embeddings(data, model, _EmbeddingUsage(tokens, tokens)))


def event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: %s\n\n" % data


def usage_of(usages: Sequence[Usage]) -> _Usage:
    """The sum of the usages of several prompts."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages)
    return _Usage(prompt, prompt + completion, completion, _PromptDetails(cached) if cached else None)


def _most_likely(tokens: Sequence[Logprob], most: int) -> list[Logprob]:
    return sorted(tokens, key=lambda each: -each.logprob)[:most]


def _text(token: Logprob) -> str:
    return token.text if token.text is not None else f"token_id:{token.token_id}"


def _parts(token: Logprob) -> tuple[str, float, list[int]]:
    text = _text(token)
    return text, token.logprob, list(text.encode())
