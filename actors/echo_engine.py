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
import zlib
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated

import anyio
import anyio.lowlevel
import msgspec

from actors.engine import Delta, EngineLoad, EngineSpec, GenerateRequest, Prompt, Usage, is_chat
from arun.errors import EngineDead, EngineError, MisuseError, RequestError

__all__ = ("EchoEngine", "EchoOptions")

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
    """

    start_seconds: _Seconds = 0.0
    first_token_seconds: _Seconds = 0.0
    token_seconds: _Seconds = 0.0
    fail_start: str | None = None
    fail_on: str | None = None
    hang_on: str | None = None
    die_after: Annotated[int, msgspec.Meta(ge=0)] | None = None


class EchoEngine:
    """Answers with the words of the prompt: of a text its words, of a chat those of the last user message, of token ids the
    ids themselves, written as numbers. ``ignore_eos`` begins again until ``max_tokens`` is reached.

    :param spec: its ``engine_args`` are :class:`EchoOptions`; ``max_model_len`` is counted in words.
    :raises MisuseError: an unknown option, or a value of the wrong type.
    """

    def __init__(self, spec: EngineSpec) -> None:
        try:
            self._options = msgspec.convert(spec.engine_args, EchoOptions)
        except msgspec.ValidationError as exc:
            known = ", ".join(EchoOptions.__struct_fields__)
            raise MisuseError(f"engine_args of the echo engine: {exc}; known are {known}") from None
        self._max_model_len = spec.max_model_len
        self._died: str | None = None
        self._in_flight = self._started = self._finished = self._failed = self._aborted = self._tokens = 0

    async def start(self) -> None:
        await anyio.sleep(self._options.start_seconds)
        if self._options.fail_start is not None:
            raise EngineError(self._options.fail_start)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        self._started += 1
        self._in_flight += 1
        finished = False
        try:
            async for delta in self._answer(request):
                finished = delta.finish_reason is not None
                yield delta
        except (RequestError, EngineDead):
            self._failed += 1
            finished = True
            raise
        finally:
            self._in_flight -= 1
            if not finished:
                self._aborted += 1

    async def check_health(self) -> None:
        if self._died is not None:
            raise EngineDead(self._died)

    def load(self) -> EngineLoad:
        return EngineLoad(self._in_flight, self._started, self._finished, self._failed, self._aborted, self._tokens)

    async def stop(self) -> None:
        self._died = self._died or "the echo engine was stopped"

    async def _answer(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        await self.check_health()
        text = _spoken(request.prompt)
        words = _words(text)
        self._admit(text, len(words))
        if self._options.hang_on is not None and self._options.hang_on in text:
            await anyio.sleep_forever()
        pieces, finish_reason = _plan(words, request)
        usage = Usage(prompt_tokens=len(words), completion_tokens=len(pieces))
        await anyio.sleep(self._options.first_token_seconds)
        for position, piece in enumerate(pieces, start=1):
            if position > 1:
                await anyio.sleep(self._options.token_seconds)
            self._count_token()
            if position < len(pieces):
                yield Delta(piece, [_token_id(piece)])
        self._finished += 1
        last = pieces[-1:]
        yield Delta("".join(last), [_token_id(piece) for piece in last], finish_reason=finish_reason, usage=usage)

    def _admit(self, text: str, words: int) -> None:
        if self._options.fail_on is not None and self._options.fail_on in text:
            raise RequestError(f"the echo engine refuses prompts with {self._options.fail_on!r}, as it was told to")
        if not words:
            raise RequestError("the prompt is empty")
        if self._max_model_len is not None and words >= self._max_model_len:
            raise RequestError(
                f"the prompt has {words} tokens, which leaves no room for an answer: max_model_len is {self._max_model_len}"
            )

    def _count_token(self) -> None:
        if self._died is None and self._options.die_after is not None and self._tokens >= self._options.die_after:
            self._died = f"the echo engine died after {self._tokens} tokens, as it was told to"
        if self._died is not None:
            raise EngineDead(self._died)
        self._tokens += 1


def _spoken(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    if is_chat(prompt):
        return next((message.content for message in reversed(prompt) if message.role == "user"), "")
    return " ".join(str(token) for token in prompt)


def _words(text: str) -> list[str]:
    """The text cut before the white space in front of each word; joined again they are the text, save white space at the end."""
    return re.findall(r"\s*\S+", text)


def _plan(words: Sequence[str], request: GenerateRequest) -> tuple[Sequence[str], str]:
    """The tokens to answer with, and why they end there."""
    sampling = request.sampling
    if sampling.ignore_eos:
        again = [words[0] if words[0][0].isspace() else " " + words[0], *words[1:]]
        while len(words) < sampling.max_tokens:
            words = [*words, *again]
    whole = "".join(words)
    stops = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
    cuts = [(at, stop) for stop in stops if (at := whole.find(stop)) >= 0]
    if cuts:
        at, stop = min(cuts)
        words = _words(whole[: at + len(stop)] if sampling.include_stop_str_in_output else whole[:at])
    if len(words) > sampling.max_tokens:
        return words[: sampling.max_tokens], "length"
    return words, "length" if sampling.ignore_eos and not cuts else "stop"


def _token_id(piece: str) -> int:
    return int(piece) if piece.strip().isdecimal() else zlib.crc32(piece.encode())
