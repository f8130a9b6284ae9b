"""What the endpoints need of whatever answers. ``actors.EnginePool`` has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, Self

__all__ = ("Backend", "Choice", "Completion", "Delta", "Deltas", "Embedding", "Logprob", "Usage")


class Usage(Protocol):
    """Tokens of one request."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...


class Logprob(Protocol):
    """How likely one token was."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def text(self) -> str | None: ...


class Choice(Protocol):
    """One whole answer; ``logprobs``: for each token the token itself, then the most likely ones."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def logprobs(self) -> Sequence[Sequence[Logprob]] | None: ...


class Delta(Choice, Protocol):
    """A piece of one answer; the last one of the request has the usage."""

    @property
    def usage(self) -> Usage | None: ...


class Completion(Protocol):
    """All answers to one request."""

    @property
    def choices(self) -> Sequence[Choice]: ...
    @property
    def usage(self) -> Usage: ...


class Embedding(Protocol):
    """A vector, as little-endian float32 and as numbers."""

    @property
    def data(self) -> bytes: ...
    @property
    def vector(self) -> list[float]: ...
    @property
    def prompt_tokens(self) -> int: ...


class Deltas(Protocol):
    """A stream of deltas; closing or cancelling it ends the request."""

    def __aiter__(self) -> Self: ...
    async def __anext__(self) -> Delta: ...
    async def aclose(self) -> None: ...


class Backend(Protocol):
    """Called with a prompt and, by name, vLLM's sampling parameters and ``request_id``.

    A prompt is text, token ids, or chat messages as dicts.
    """

    @property
    def generate(self) -> Callable[..., Deltas]:
        """Stream an answer."""
        ...

    @property
    def complete(self) -> Callable[..., Awaitable[Completion]]:
        """Give an answer whole."""
        ...

    @property
    def embed(self) -> Callable[..., Awaitable[Embedding]]:
        """Give a vector; also takes ``dimensions`` and ``normalize``."""
        ...
