"""EchoEngine: the Engine protocol without a model, for tests.

It answers with the words of the prompt, a token a word, always the same for the same prompt, as fast or as slowly
as it is told, and fails on demand. Needs no vLLM, torch or Ray, and runs on asyncio and on trio.

>>> spec = EngineSpec(model="echo", engine="echo", engine_args={"token_seconds": 0.01, "fail_on": "poison"})
>>> async with cluster.engines(spec) as pool:
...     (await pool.complete("to be or not", max_tokens=3)).text
'to be or'
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Annotated

import anyio
import msgspec

from actors.engine import (
    Delta,
    EngineLoad,
    EngineMetrics,
    EngineSpec,
    GenerateRequest,
    Outcome,
    Pooling,
    Prompt,
    Sampling,
    Tally,
    Usage,
    is_chat,
)
from arun.errors import EngineDead, EngineError, MisuseError, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

__all__ = ("EchoEngine", "EchoOptions")

_NEEDS_A_MODEL = ("logprobs", "prompt_logprobs", "bad_words", "logit_bias", "allowed_token_ids")
_EMBEDDING_SIZE = 16

_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class EchoOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``EngineSpec.engine_args`` may hold for the echo engine.

    :ivar start_seconds: how long the start takes.
    :ivar first_token_seconds: before the first token of each answer.
    :ivar token_seconds: before every further token.
    :ivar fail_start: the start fails with this message.
    :ivar fail_on: a prompt that contains this text is refused with RequestError.
    :ivar hang_on: a prompt that contains this text is never answered.
    :ivar die_after: tokens after which the engine is dead, for this and every other request.
    :ivar die_on: a prompt that contains this text leaves the engine dead.
    """

    start_seconds: _Seconds = 0.0
    first_token_seconds: _Seconds = 0.0
    token_seconds: _Seconds = 0.0
    fail_start: str | None = None
    fail_on: str | None = None
    hang_on: str | None = None
    die_after: Annotated[int, msgspec.Meta(ge=0)] | None = None
    die_on: str | None = None


class EchoEngine:
    """Answers with the words of the prompt, and begins again until ``max_tokens`` with ``ignore_eos``.

    Of a chat it repeats the last user message, of token ids the ids themselves, written as numbers. With ``n`` it says
    the same that often. An embedding counts the words of the prompt, each in one of 16 places or of ``dimensions``.
    Asked for JSON, it repeats a prompt that is JSON. What needs a model, such as log-probabilities, is refused by name.

    :param spec: its ``engine_args`` are :class:`EchoOptions`; ``max_model_len`` is counted in words.
    :raises MisuseError: an unknown option, or a value of the wrong type.
    """

    resumes = True

    def __init__(self, spec: EngineSpec) -> None:
        try:
            self._options = msgspec.convert(spec.engine_args, EchoOptions)
        except msgspec.ValidationError as exc:
            known = ", ".join(EchoOptions.__struct_fields__)
            raise MisuseError(f"engine_args of the echo engine: {exc}; known are {known}") from None
        self._max_model_len = spec.max_model_len
        self._tally = Tally()
        self._died: str | None = None

    async def start(self) -> None:
        await anyio.sleep(self._options.start_seconds)
        if self._options.fail_start is not None:
            raise EngineError(self._options.fail_start)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._tally.begin()
        outcome: Outcome = "aborted"
        try:
            await self.check_health()
            text = _spoken(request.prompt)
            words = self._admit(text)
            _refuse_what_needs_a_model(request, text)
            if self._options.hang_on is not None and self._options.hang_on in text:
                await anyio.sleep_forever()
            if self._options.die_on is not None and self._options.die_on in text:
                self._died = self._died or f"the echo engine died of a prompt with {self._options.die_on!r}, as told"
                raise EngineDead(self._died)
            room = None if self._max_model_len is None else self._max_model_len - len(words)
            pieces, finish_reason = _answer(words, request.sampling, len(request.resume), room)
            await anyio.sleep(self._options.first_token_seconds)
            if request.pooling is not None:
                outcome = "finished"
                yield Delta(usage=Usage(len(words), 0), embedding=_embedding(words, request.pooling))
                return
            answers, began = range(request.sampling.n), anyio.current_time()
            for piece in pieces[:-1]:
                for index in answers:
                    self._count_token()
                    if not request.whole:
                        yield Delta(piece, [_token_id(piece)], index)
                await anyio.sleep(self._options.token_seconds)
            last = pieces if request.whole else pieces[-1:]
            first_ago = anyio.current_time() - began if request.whole else None
            for index in answers:
                if pieces:  # there are none when the answer begins with a stop string
                    self._count_token()
                usage = None
                if index == answers[-1]:
                    outcome = "finished"
                    usage = Usage(len(words) + len(request.resume), len(answers) * len(pieces))
                token_ids = [_token_id(piece) for piece in last]
                yield Delta("".join(last), token_ids, index, finish_reason, usage, first_ago=first_ago)
        except EngineError:
            outcome = "failed"
            raise
        finally:
            self._tally.end(outcome)

    async def check_health(self) -> None:
        if self._died is not None:
            raise EngineDead(self._died)

    def load(self) -> EngineLoad:
        return self._tally.load()

    def metrics(self) -> EngineMetrics:
        """Running requests and generated tokens; the rest needs a model."""
        load = self._tally.load()
        return EngineMetrics(running=load.in_flight, completion_tokens=load.tokens)

    async def stop(self) -> None:
        self._died = self._died or "the echo engine was stopped"

    def _admit(self, text: str) -> list[str]:
        if self._options.fail_on is not None and self._options.fail_on in text:
            raise RequestError(f"the echo engine refuses prompts with {self._options.fail_on!r}, as it was told to")
        words = _words(text)
        if not words:
            raise RequestError("the prompt is empty")
        if self._max_model_len is not None and len(words) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(words)} tokens, which leaves no room for an answer: "
                f"max_model_len is {self._max_model_len}"
            )
        return words

    def _count_token(self) -> None:
        if self._died is None and self._options.die_after is not None and self._tally.tokens >= self._options.die_after:
            self._died = f"the echo engine died after {self._tally.tokens} tokens, as it was told to"
        if self._died is not None:
            raise EngineDead(self._died)
        self._tally.tokens += 1


def _spoken(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if is_chat(prompt):
        return next((message.content or "" for message in reversed(prompt) if message.role == "user"), "")
    return " ".join(str(token) for token in prompt)


def _words(text: str) -> list[str]:
    """The words, each with the white space before it: joined, they are the text again."""
    return re.findall(r"\s*\S+", text)


def _answer(words: list[str], sampling: Sampling, begun: int, room: int | None) -> tuple[list[str], str]:
    """The tokens to answer with, and why they end there.

    :param begun: of the answer, told before.
    :param room: for an answer in the context; None is without end.
    """
    asked = None if sampling.max_tokens is None else begun + sampling.max_tokens
    limits = [limit for limit in (asked, room) if limit is not None]
    if not limits and sampling.ignore_eos:
        raise RequestError("ignore_eos with max_tokens=None would never end: the echo engine has no max_model_len")
    max_tokens = min(limits, default=len(words))
    if sampling.ignore_eos:
        spaced = " ".join(word.strip() for word in words)
        repeats = -(-max_tokens // len(words))
        words = _words(" ".join([spaced] * repeats))
    text = "".join(words)
    stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
    cuts = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    if cuts:
        at, stop = min(cuts)
        words = _words(text[: at + len(stop)] if sampling.include_stop_str_in_output else text[:at])
    if len(words) > max_tokens or (sampling.ignore_eos and not cuts):
        return words[begun:max_tokens], "length"
    return words[begun:], "stop"


def _token_id(piece: str) -> int:
    return zlib.crc32(piece.encode())


def _refuse_what_needs_a_model(request: GenerateRequest, text: str) -> None:
    asked = [name for name in _NEEDS_A_MODEL if getattr(request.sampling, name) is not None]
    asked += ["adapter"] if request.adapter is not None else []
    asked += sorted(msgspec.to_builtins(request.chat)) if request.chat is not None else []
    structured = request.sampling.structured_outputs
    if structured is not None:
        if structured.json is None and not structured.json_object:
            asked.append("structured_outputs other than JSON")
        elif not _is_json(text):
            asked.append("structured_outputs of a prompt that is no JSON for it to repeat")
    if asked:
        raise RequestError(f"the echo engine has no model, so it can't do {', '.join(asked)}; use engine='vllm'")


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return False
    return True


def _embedding(words: list[str], pooling: Pooling) -> bytes:
    counts = [0.0] * (pooling.dimensions or _EMBEDDING_SIZE)
    for word in words:
        counts[_token_id(word.strip()) % len(counts)] += 1.0
    length = sum(count * count for count in counts) ** 0.5 if pooling.normalize is not False else 1.0
    return struct.pack(f"<{len(counts)}f", *(count / length for count in counts))
