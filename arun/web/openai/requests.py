"""What clients send, as OpenAI's API and vLLM's additions to it have it, and what a backend is called with for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from arun.errors import RequestError

__all__ = ("ChatRequest", "CompletionRequest", "EmbeddingRequest", "Tokens")

Tokens = list[int]
_Count = Annotated[int, msgspec.Meta(ge=1)]

_PASSED_ON = (
    "temperature",
    "top_p",
    "n",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
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
    "priority",
)
"""Fields that a backend has under the same name; it judges their values."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class _Sampled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What chats and completions have in common. What is not here is refused, not overlooked."""

    model: str
    max_tokens: _Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    min_tokens: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None
    # These make no difference to an answer.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _options(self, max_tokens: int, logprobs: int | None) -> dict[str, Any]:
        given = {name: value for name in _PASSED_ON if (value := getattr(self, name)) is not None}
        given["max_tokens"] = max_tokens
        if logprobs is not None:
            given["logprobs"] = logprobs
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs
        return given


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct, omit_defaults=True):
    """A turn; fields of OpenAI's that a chat template has no use for are left out."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """The message with its content as one text."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type != "text" or part.text is None:
                    raise RequestError(f"messages: a part of type {part.type!r}; the models here read text only")
            content = "".join(part.text or "" for part in content)
        return {**msgspec.to_builtins(self), "content": content}


class JsonSchema(msgspec.Struct):
    schema: dict[str, Any] | None = None


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Sampled, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        """The turns of the chat."""
        return [message.plain() for message in self.messages]

    def options(self, max_tokens: int) -> dict[str, Any]:
        """What a backend is called with by name.

        :param max_tokens: where the request has no limit.
        :raises RequestError: it asks for what nothing here can do.
        """
        if self.tools:
            raise RequestError("tools: calls of tools are not told from text here; describe the tools in a message")
        if self.add_generation_prompt not in {None, not self.continue_final_message}:
            raise RequestError("add_generation_prompt: it must be the opposite of continue_final_message")
        given = self._options(
            self.max_completion_tokens or self.max_tokens or max_tokens,
            (self.top_logprobs or 0) if self.logprobs else None,
        )
        if self.response_format is not None and self.response_format.type != "text":
            given["structured_outputs"] = _structured(self.response_format)
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return {**given, "continue_final_message": True} if self.continue_final_message else given


class CompletionRequest(_Sampled, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | Tokens]
    logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | Tokens]:
        """The prompts, each text or token ids."""
        return _each(self.prompt, "prompt")

    def options(self, max_tokens: int) -> dict[str, Any]:
        """What a backend is called with by name, with each prompt.

        :param max_tokens: where the request has no limit.
        :raises RequestError: it asks for what nothing here can do.
        """
        if self.echo or self.suffix or (self.best_of or 1) > (self.n or 1):
            raise RequestError("echo, suffix and best_of can't be had here")
        return self._options(self.max_tokens or max_tokens, self.logprobs)


class EmbeddingRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/embeddings``."""

    model: str
    input: str | list[str | int | Tokens]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None
    user: Any = None

    @property
    def inputs(self) -> list[str | Tokens]:
        """The texts, or their token ids."""
        return _each(self.input, "input")

    def options(self) -> dict[str, Any]:
        """What a backend is called with by name."""
        given = {"dimensions": self.dimensions, "normalize": self.normalize}
        return {name: value for name, value in given.items() if value is not None}


def _structured(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise RequestError("response_format: json_schema.schema is missing")
    return {"json": wanted.json_schema.schema}


def _each(given: str | list[str | int | Tokens], what: str) -> list[str | Tokens]:
    if isinstance(given, str):
        return [given]
    numbers = [part for part in given if isinstance(part, int)]
    if numbers and len(numbers) == len(given):
        return [numbers]
    several = [part for part in given if not isinstance(part, int)]
    if numbers or not several:
        raise RequestError(f"{what}: give a text, a list of token ids, or a list of either; not an empty or mixed one")
    return several
