"""What an engine answers: deltas, and the completion or the embedding that they make up."""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence

import msgspec

__all__ = ("Choice", "Completion", "Delta", "Embedding", "Logprob", "Reset", "Usage")


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Tokens of one request.

    :ivar completion_tokens: of all answers together, where ``n`` asked for several.
    :ivar cached_tokens: of the prompt's, those that the engine had in its prefix cache.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Logprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How likely one token was at one position.

    :ivar logprob: natural logarithm of its probability.
    :ivar rank: 1 for the most likely token of the vocabulary.
    :ivar text: the token as text; a token may be a part of a character.
    """

    token_id: int
    logprob: float
    rank: int | None = None
    text: str | None = None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What an engine generated since the last delta of the same request.

    :ivar text: may be empty while a character or a possible stop string is incomplete.
    :ivar token_ids: ``list[int]``, the new tokens; all deltas of one index together are at most ``max_tokens`` long.
    :ivar index: which of several answers to one prompt, from 0.
    :ivar finish_reason: None until the last delta of its index, then ``"stop"`` (end of sequence or stop string)
        or ``"length"`` (max_tokens, or the model's context is full).
    :ivar usage: on the last delta of the request.
    :ivar stop_reason: with ``finish_reason``, the stop string or token id that ended it; None for the end of sequence.
    :ivar logprobs: as asked for: for each new token the token itself, then the most likely ones.
    :ivar prompt_logprobs: on the first delta, as asked for: the same for each token of the prompt; None for its first.
    :ivar embedding: the answer of an engine that embeds, little-endian float32; see :class:`Embedding`.
    :ivar epoch: that of the request that it answers; see :class:`~actors.engine.GenerateRequest`.
    :ivar load: where it has changed: requests that the engine has in all, of whatever client.
    :ivar first_ago: of an answer that came whole: seconds since its first token was there.
    """

    text: str = ""
    token_ids: list[int] = []
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    stop_reason: int | str | None = None
    logprobs: list[list[Logprob]] | None = None
    prompt_logprobs: list[list[Logprob] | None] | None = None
    embedding: bytes | None = None
    epoch: int = 0
    load: int | None = None
    first_ago: float | None = None


class Reset(Delta, frozen=True, omit_defaults=True, gc=False):
    """The answer begins anew: forget the deltas so far. Only sent to who asked for ``reroute="restart"``.

    It is a delta without text, made by the pool when a replica was lost that no other one can go on for.

    :ivar attempt: which one begins, so at least 2.
    """

    attempt: int = 2


class Choice(msgspec.Struct, frozen=True, omit_defaults=True):
    """One whole answer to a prompt; its fields are those of :class:`Delta`, joined."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[list[Logprob]] | None = None


class Completion(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that was answered to one request. ``text``, ``token_ids`` and so on are those of the first choice.

    :ivar choices: length ``n``, by index.
    :ivar time_to_first_token: seconds from the call to the first delta, waiting for admission included.
    """

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    time_to_first_token: float | None = None
    prompt_logprobs: list[list[Logprob] | None] | None = None

    @classmethod
    def of(cls, request_id: str, deltas: Sequence[Delta], time_to_first_token: float | None = None) -> Completion:
        """Join all deltas of one request."""
        by_index: dict[int, list[Delta]] = {}
        for delta in deltas:
            by_index.setdefault(delta.index, []).append(delta)
        return cls(
            request_id,
            tuple(_joined(index, by_index[index]) for index in sorted(by_index)) or (Choice(0, "", [], None),),
            next((delta.usage for delta in reversed(deltas) if delta.usage is not None), Usage(0, 0)),
            time_to_first_token,
            next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
        )

    @property
    def text(self) -> str:
        """The first answer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """``list[int]``, the tokens of the first answer."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why the first answer ended; see :class:`Delta`."""
        return self.choices[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or token id that ended the first answer."""
        return self.choices[0].stop_reason

    @property
    def logprobs(self) -> list[list[Logprob]] | None:
        """For each token of the first answer the token itself, then the most likely ones."""
        return self.choices[0].logprobs


class Embedding(msgspec.Struct, frozen=True):
    """The vector of one text.

    :ivar data: little-endian float32; ``numpy.frombuffer(embedding.data, "<f4")`` copies nothing.
    """

    request_id: str
    data: bytes
    prompt_tokens: int

    @property
    def vector(self) -> list[float]:
        """``list[float]``, length the model's hidden size or the ``dimensions`` asked for."""
        floats = array.array("f", self.data)
        if sys.byteorder == "big":
            floats.byteswap()
        return floats.tolist()


def _joined(index: int, deltas: list[Delta]) -> Choice:
    with_logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    last = next((delta for delta in reversed(deltas) if delta.finish_reason is not None), None)
    return Choice(
        index,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        None if last is None else last.finish_reason,
        None if last is None else last.stop_reason,
        [position for logprobs in with_logprobs for position in logprobs] if with_logprobs else None,
    )
