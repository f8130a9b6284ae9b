"""Affinity: which replica has the beginning of a prompt in its cache.

A prompt is known by the keys of its beginnings: one key for each block of text or tokens, each made from all blocks up
to it. So the longest beginning that two prompts share is the last key that they have in common.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from actors.requests import is_chat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from actors.requests import Prompt

__all__ = ("Homes", "prefix_keys")

_BLOCK_CHARS = 256
_BLOCK_TOKENS = 64
_BLOCKS = 64  # what is equal up to here is taken for equal


def prefix_keys(prompt: Prompt) -> tuple[int, ...]:
    """Keys of the beginnings of a prompt, shortest first: of a chat its turns, else whole blocks of it.

    A short prompt has none. Two prompts may share a key by chance, which only sends one of them to a busier replica.
    """
    key, keys = 0, []
    for block in _blocks(prompt):
        key = zlib.crc32(block, key)
        keys.append(key)
        if len(keys) == _BLOCKS:
            break
    return tuple(keys)


def _blocks(prompt: Prompt) -> Iterator[bytes]:
    if isinstance(prompt, str):
        for end in range(_BLOCK_CHARS, len(prompt) + 1, _BLOCK_CHARS):
            yield prompt[end - _BLOCK_CHARS : end].encode("utf-8", "surrogatepass")
    elif is_chat(prompt):
        for message in prompt:
            yield f"{message.role}\0{message.content}".encode("utf-8", "surrogatepass")
    else:
        for end in range(_BLOCK_TOKENS, len(prompt) + 1, _BLOCK_TOKENS):
            yield repr(prompt[end - _BLOCK_TOKENS : end]).encode()


class Homes:
    """Which replica served a beginning last; forgets what was not used for longest.

    :param size: most keys to remember.
    """

    __slots__ = ("_homes", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._homes: dict[int, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._homes)

    def find(self, keys: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Replica and generation that served these beginnings, the longest beginning first."""
        for key in reversed(keys):
            home = self._homes.get(key)
            if home is not None:
                yield home

    def served(self, keys: Sequence[int], replica: int, generation: int) -> None:
        """A prompt with these keys was sent there."""
        for key in keys:
            self._homes.pop(key, None)  # so that it goes to the end, where the latest are
            self._homes[key] = (replica, generation)
        while len(self._homes) > self._size:
            del self._homes[next(iter(self._homes))]
