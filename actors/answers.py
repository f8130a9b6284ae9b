"""What an engine answers: deltas, and the completion that they make up."""

from __future__ import annotations

import msgspec

__all__ = ("Completion", "Delta", "Usage")


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int


class Delta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What an engine generated since the last delta of the same request.

    :ivar text: may be empty while a character or a possible stop string is incomplete.
    :ivar token_ids: ``list[int]``, the new tokens; all deltas together are at most ``max_tokens`` long.
    :ivar index: which of several answers to one prompt.
    :ivar finish_reason: None until the last delta, then ``"stop"`` (end of sequence or stop string),
        ``"length"`` (max_tokens or the model's context is full) or ``"abort"``.
    :ivar usage: on the last delta.
    """

    text: str = ""
    token_ids: list[int] = []
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


class Completion(msgspec.Struct, frozen=True):
    """A whole answer.

    :ivar token_ids: ``list[int]``, length ``usage.completion_tokens``.
    :ivar time_to_first_token: seconds from the call to the first delta, waiting for admission included.
    """

    request_id: str
    text: str
    token_ids: list[int]
    finish_reason: str | None
    usage: Usage
    time_to_first_token: float | None
