"""Outcome: how a subtask ended, as a value."""

from __future__ import annotations

from typing import Generic, TypeAlias, TypeVar

import msgspec

__all__ = ("Failed", "Ok", "Outcome", "Skipped")

T = TypeVar("T")


class Ok(msgspec.Struct, Generic[T], frozen=True):
    """The subtask ended with a result."""

    value: T


class Failed(msgspec.Struct, frozen=True):
    """The subtask raised."""

    error: Exception


class Skipped(msgspec.Struct, frozen=True):
    """The subtask did not finish: it was cancelled before its end or never started."""

    reason: str


Outcome: TypeAlias = Ok[T] | Failed | Skipped
