"""What an engine is asked: prompts, sampling parameters, requests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, TypeGuard

import msgspec

from arun.errors import RequestError

__all__ = (
    "ChatMessage",
    "GenerateRequest",
    "Lane",
    "Prompt",
    "PromptLike",
    "Sampling",
    "SamplingOptions",
    "is_chat",
    "is_tokens",
    "to_prompt",
)

Lane = Literal["interactive", "batch"]


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
