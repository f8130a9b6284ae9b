"""What an engine is asked: prompts, sampling parameters, requests."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, TypeGuard, get_args

import msgspec

from arun.errors import RequestError

__all__ = (
    "ChatMessage",
    "ChatOptions",
    "GenerateRequest",
    "Lane",
    "Pooling",
    "Prompt",
    "PromptLike",
    "RequestOptions",
    "Sampling",
    "SamplingOptions",
    "StructuredOutputs",
    "StructuredOutputsLike",
    "is_chat",
    "is_tokens",
    "to_embed_request",
    "to_prompt",
    "to_request",
)

Lane = Literal["interactive", "batch"]


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a chat.

    :ivar role: ``"system"``, ``"user"``, ``"assistant"`` or ``"tool"``, as the model's chat template has them.
    :ivar content: None where an assistant only calls tools.
    :ivar tool_calls: the tools that an assistant called, as OpenAI writes them.
    :ivar tool_call_id: the call that a tool's message answers.
    :ivar name: of the tool or speaker.
    """

    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


# Text, token ids, or the turns of a chat. One sequence type, because msgspec allows one array in a union;
# is_tokens() and is_chat() tell the two apart.
Prompt = str | Sequence[int | ChatMessage]

# What a user may write for it.
PromptLike = Prompt | Sequence[Mapping[str, Any]]


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
        checked: Prompt = msgspec.convert(prompt, Prompt)
    except msgspec.ValidationError as exc:
        raise RequestError(f"a prompt is text, a list of token ids or a list of chat messages: {exc}") from None
    if not checked:
        raise RequestError("the prompt is empty")
    if isinstance(checked, str):
        _check_text(checked)
    elif is_chat(checked):
        for message in checked:
            _check_text(message.content or "")
    elif not is_tokens(checked):
        raise RequestError("the prompt has both token ids and chat messages; give a list of either")
    return checked


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(f"the prompt is no valid text: {exc}") from None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What an answer must look like; exactly one field is given. Names and meanings are vLLM's.

    :ivar json: a JSON schema, as a dict or as text.
    :ivar regex: a regular expression that the whole answer matches.
    :ivar choice: the answers to choose from.
    :ivar grammar: a context-free grammar in EBNF.
    :ivar json_object: any JSON object.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            known = ", ".join(self.__struct_fields__)
            raise ValueError(f"exactly one of {known} is needed; given are {', '.join(given) or 'none'}")


# What a user may write for it: {"regex": ...}, {"json": schema or type}, or a type, whose JSON schema the answer
# then follows: a msgspec Struct, a dataclass, a TypedDict or a pydantic model.
StructuredOutputsLike = StructuredOutputs | Mapping[str, Any] | type


# What OpenAI's API, transformers and earlier vLLMs call it.
_ELSEWHERE = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "response_format": "structured_outputs",
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "lora_request": "adapter",
}

# What vLLM and OpenAI's API have, and what to do instead.
_NOT_HERE = {
    "sampling_params": "give its fields by name, as in generate(prompt, max_tokens=64, temperature=0.0)",
    "detokenize": "deltas and completions have token_ids beside their text",
    "truncate_prompt_tokens": "cut the prompt yourself; it may be a list of token ids",
    "output_kind": "generate() gives deltas, complete() the answer as a whole",
    "stream": "generate() streams deltas, complete() gives the answer as a whole",
    "best_of": "ask for n answers and choose by their logprobs",
    "logits_processors": "an engine's own are named in EngineSpec(engine_args={'logits_processors': [...]})",
}


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose tokens and when to stop; names and meanings are those of vLLM's SamplingParams.

    ``None`` means the model's own default (its generation_config.json), else vLLM's.

    :ivar max_tokens: most tokens to generate; None: as many as the model's context has room for.
    :ivar min_tokens: tokens to generate before an end-of-sequence or stop string counts.
    :ivar temperature: 0 is greedy.
    :ivar top_k: 0 or -1 considers all tokens.
    :ivar seed: of this request's own random generator.
    :ivar stop: strings that end the answer; they are not part of it unless ``include_stop_str_in_output``.
    :ivar ignore_eos: go on to ``max_tokens``.
    :ivar n: answers to one prompt; each delta says by its index to which it belongs.
    :ivar logprobs: how many of the most likely tokens to report with each token; 0 reports the token alone, -1 all.
    :ivar prompt_logprobs: the same for the tokens of the prompt.
    :ivar bad_words: never generated.
    :ivar logit_bias: added to the logits of these token ids.
    :ivar allowed_token_ids: no others are generated.
    :ivar structured_outputs: what the answer must look like.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = 16
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    n: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    logprobs: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    prompt_logprobs: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputs | None = None

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Sampling:
        """Check options given by name; those that are None count as not given, but for ``max_tokens``.

        :raises RequestError: an unknown name (the message has the nearest known one) or a value out of range.
        """
        for name in options:
            if name not in cls.__struct_fields__:
                known = list(dict.fromkeys((*cls.__struct_fields__, *RequestOptions.__annotations__)))
                if name in _NOT_HERE:
                    raise RequestError(f"there is no sampling parameter {name!r}; {_NOT_HERE[name]}")
                near = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise RequestError(f"there is no sampling parameter {name!r}; {hint}")
        given = {name: value for name, value in options.items() if value is not None or name == "max_tokens"}
        if "structured_outputs" in given:
            given["structured_outputs"] = _to_structured_outputs(given["structured_outputs"])
        try:
            return msgspec.convert(given, cls)
        except msgspec.ValidationError as exc:
            raise RequestError(f"sampling parameters: {exc}") from None

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, and ``max_tokens``, by name."""
        return {
            name: value
            for name, default in zip(self.__struct_fields__, self.__struct_defaults__, strict=True)
            if (value := getattr(self, name)) != default or name == "max_tokens"
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
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    bad_words: list[str] | None
    logit_bias: dict[int, float] | None
    allowed_token_ids: list[int] | None
    structured_outputs: StructuredOutputsLike | None


class RequestOptions(SamplingOptions, total=False):
    """What ``pool.generate()`` takes by name besides.

    :ivar adapter: the LoRA adapter to answer with; one of the names in ``EngineSpec.adapters``.
    :ivar tools: that the model may call, as OpenAI writes them; for chat messages, where the model's template has them.
    :ivar chat_template: instead of the model's own, a Jinja template.
    :ivar chat_template_kwargs: further variables of the template, for example ``{"enable_thinking": False}``.
    :ivar continue_final_message: the answer goes on with the last message instead of beginning a new one.
    """

    adapter: str | None
    tools: Sequence[Mapping[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How chat messages become one prompt; see :class:`RequestOptions`."""

    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False


class Pooling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ask for the prompt's embedding instead of its continuation.

    :ivar dimensions: keep this many; for models trained so (Matryoshka). None keeps all.
    :ivar normalize: to length 1. None is the model's own default.
    """

    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    normalize: bool | None = None


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask an engine to continue ``prompt``, or, with ``pooling``, to embed it.

    :ivar request_id: unique among the requests that an engine has at one time.
    :ivar prompt: text, token ids (``list[int]``, length < max_model_len) or chat messages.
    :ivar lane: ``"interactive"`` goes before ``"batch"`` where the engine schedules by priority.
    :ivar priority: within a lane, lower goes first.
    :ivar adapter: name of the LoRA adapter to answer with.
    :ivar chat: how chat messages become one prompt.
    :ivar pooling: embed instead; the one delta of the answer has the embedding.
    :ivar resume: ``list[int]``, tokens of the answer that another replica generated before it was lost. The engine
        continues after prompt and these; ``max_tokens`` counts what is still to come, ``Usage`` them as prompt.
    :ivar epoch: which start of this request it is, from 0.
    :ivar whole: nobody reads the answer before its end, so the engine may give it as one delta an index.
    """

    request_id: str
    prompt: Prompt
    sampling: Sampling = Sampling()
    lane: Lane = "interactive"
    priority: int = 0
    adapter: str | None = None
    chat: ChatOptions | None = None
    pooling: Pooling | None = None
    resume: list[int] = []
    epoch: int = 0
    whole: bool = False


def to_request(
    request_id: str,
    prompt: PromptLike,
    options: Mapping[str, object],
    *,
    lane: Lane = "interactive",
    priority: int = 0,
    whole: bool = False,
) -> GenerateRequest:
    """Check a request as a user gives it.

    :param options: fields of :class:`Sampling` and :class:`RequestOptions` by name; None counts as not given.
    :raises RequestError: an unknown name (the message has the nearest known one) or a value out of range.
    """
    _check_routing(request_id, lane, priority)
    sampling = dict(options)
    adapter = sampling.pop("adapter", None)
    chat = {name: value for name in ChatOptions.__struct_fields__ if (value := sampling.pop(name, None)) is not None}
    checked = to_prompt(prompt)
    if chat and not is_chat(checked):
        raise RequestError(f"{', '.join(chat)}: only chat messages have a template, and this prompt is none")
    try:
        return GenerateRequest(
            request_id,
            checked,
            Sampling.of(sampling),
            lane,
            priority,
            msgspec.convert(adapter, str | None),
            msgspec.convert(chat, ChatOptions) if chat else None,
            whole=whole,
        )
    except msgspec.ValidationError as exc:
        raise RequestError(f"request options: {exc}") from None


def to_embed_request(
    request_id: str,
    prompt: PromptLike,
    pooling: Mapping[str, object],
    *,
    lane: Lane = "interactive",
    priority: int = 0,
) -> GenerateRequest:
    """Check a request for an embedding as a user gives it.

    :param pooling: fields of :class:`Pooling` by name.
    :raises RequestError: a value out of range.
    """
    try:
        checked = msgspec.convert(pooling, Pooling)
    except msgspec.ValidationError as exc:
        raise RequestError(f"embed: {exc}") from None
    _check_routing(request_id, lane, priority)
    return GenerateRequest(request_id, to_prompt(prompt), lane=lane, priority=priority, pooling=checked)


def _check_routing(request_id: object, lane: object, priority: object) -> None:
    """:raises RequestError: one of these is nothing that a pool could go by."""
    if lane not in get_args(Lane):
        raise RequestError(f"lane={lane!r}: it must be 'interactive' or 'batch'")
    if not isinstance(request_id, str):
        raise RequestError(f"request_id={request_id!r}: it must be text")
    if not isinstance(priority, int):
        raise RequestError(f"priority={priority!r}: it must be a whole number; lower goes first")


def _to_structured_outputs(value: Any) -> StructuredOutputs:
    if isinstance(value, StructuredOutputs):
        return value
    if not isinstance(value, Mapping):
        return StructuredOutputs(json=_json_schema(value))
    given = dict(value)
    if "json" in given and not isinstance(given["json"], (str, Mapping)):
        given["json"] = _json_schema(given["json"])
    try:
        return msgspec.convert(given, StructuredOutputs)
    except msgspec.ValidationError as exc:
        hint = "; a JSON schema goes under 'json'" if "type" in given or "properties" in given else ""
        raise RequestError(f"structured_outputs: {exc}{hint}") from None


def _json_schema(kind: Any) -> dict[str, Any]:
    of_pydantic = getattr(kind, "model_json_schema", None)
    try:
        schema: dict[str, Any] = msgspec.json.schema(kind) if of_pydantic is None else of_pydantic()
    except TypeError as exc:
        raise RequestError(
            f"structured_outputs: {kind!r} has no JSON schema ({exc}); give a Struct, a dataclass, a pydantic model, "
            "or {'json': schema}, {'regex': ...}, {'choice': [...]}"
        ) from None
    return schema
