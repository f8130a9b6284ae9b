"""History: what both ends of a pool saw, a line a record, written at once so that it outlives a SIGKILL of who saw it.

The consumers, the pool's owner and the nemesis write ``owner.jsonl``; each engine process writes ``engine-PID.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

__all__ = (
    "Asked", "Began", "EngineRecord", "Ended", "Given", "History", "Left", "OwnerRecord", "Round", "Sent", "State",
    "Struck", "Submitted", "engine_records", "owner_records",
)  # fmt: skip

T = TypeVar("T")


class _Record(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, kw_only=True):
    """:ivar time: seconds of the machine's monotonic clock, which all its processes share."""

    time: float = msgspec.field(default_factory=time.monotonic)


class Round(_Record, frozen=True):
    """64 more requests begin."""

    seed: int


class Submitted(_Record, frozen=True):
    """A request was made.

    :ivar tokens: of its answer, where the consumer does not leave.
    :ivar answer: what these tokens must be, where that is known.
    :ivar resumable: whether another replica may go on with it.
    """

    request: str
    tokens: int
    answer: list[int] | None = None
    resumable: bool = True
    reroute: str = "continue"


class Asked(_Record, frozen=True):
    """A consumer waits for its next delta."""

    request: str


class Given(_Record, frozen=True):
    """A consumer was given a delta.

    :ivar attempt: where the answer begins anew with it: which attempt; the delta has no tokens.
    :ivar finish: why the answer ended, with its last delta.
    :ivar usage: tokens of the whole answer, as the last delta tells.
    """

    request: str
    epoch: int
    token_ids: list[int]
    attempt: int | None = None
    finish: str | None = None
    usage: int | None = None


class Ended(_Record, frozen=True):
    """A consumer has done with its request.

    :ivar how: "finished", "left", or the name of the error.
    """

    request: str
    how: str
    message: str = ""


class State(_Record, frozen=True):
    """A replica changed its state, as the pool shows it."""

    replica: int
    state: str


class Struck(_Record, frozen=True):
    """The nemesis did something to a replica.

    :ivar pid: of its actor's process.
    :ivar busy: whether consumers waited for it.
    """

    fault: str
    replica: int
    pid: int | None
    busy: bool = False


class Left(_Record, frozen=True):
    """What is left over where nothing should be."""

    what: list[str]


class Began(_Record, frozen=True):
    """An engine began with a request.

    :ivar resume: the tokens behind which it was to go on.
    """

    request: str
    epoch: int
    resume: list[int] = []


class Sent(_Record, frozen=True):
    """An engine is about to send tokens."""

    request: str
    epoch: int
    token_ids: list[int]


OwnerRecord: TypeAlias = Round | Submitted | Asked | Given | Ended | State | Struck | Left
EngineRecord: TypeAlias = Began | Sent


class History:
    """One process's part of a history."""

    def __init__(self, path: Path) -> None:
        # Written record by record: what a killed process had in a buffer would be missing.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._encoder = msgspec.json.Encoder()

    def add(self, record: OwnerRecord | EngineRecord) -> None:
        os.write(self._fd, self._encoder.encode(record) + b"\n")

    def close(self) -> None:
        os.close(self._fd)


def owner_records(folder: Path) -> list[OwnerRecord]:
    """What the owner's side wrote."""
    return list(_read(folder / "owner.jsonl", msgspec.json.Decoder(OwnerRecord)))


def engine_records(folder: Path) -> dict[int, list[EngineRecord]]:
    """What each engine process wrote, by its pid."""
    decoder: msgspec.json.Decoder[EngineRecord] = msgspec.json.Decoder(EngineRecord)
    return {int(path.stem.partition("-")[2]): list(_read(path, decoder)) for path in folder.glob("engine-*.jsonl")}


def _read(path: Path, decoder: msgspec.json.Decoder[T]) -> Iterator[T]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # else it was killed while it wrote, so before it did what it wrote down
            yield decoder.decode(line)
