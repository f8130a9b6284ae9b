"""Event: the one tagged union that streams, hooks, stores and server-sent events all speak.

Every event of a run carries

* ``run_id``: the run, unique;
* ``seq``: 1, 2, 3, ... within the run, without a gap;
* ``time``: seconds since the epoch;
* ``action``: name of the action in whose name it is sent (empty for events of the run itself);
* ``path``: the branches that it came through, outermost first: for each parallel action or sub-graph its name, then
  the subtask's key where one was given, else ``name[ordinal]``. ``()`` at the top level;
* ``attempt``: which attempt of the innermost subtask it belongs to, 1 for the first.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import msgspec

__all__ = (
    "ActionFinished",
    "ActionStarted",
    "Event",
    "Item",
    "Partial",
    "RunCancelled",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "SubtaskFinished",
    "SubtaskRetried",
    "SubtaskStarted",
)


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    run_id: str
    seq: int
    time: float
    action: str = ""
    path: tuple[str, ...] = ()
    attempt: int = 1


class RunStarted(_Event, frozen=True, kw_only=True, tag=True):
    """The run has begun.

    :ivar app_id: identifier of the application.
    """

    app_id: str


class ActionStarted(_Event, frozen=True, kw_only=True, tag=True):
    """An action has begun."""


class Item(_Event, frozen=True, kw_only=True, tag=True):
    """Something that an action yielded, other than a State.

    :ivar values: the items in order; more than one only where the stream was told to conflate.
    """

    values: list[Any]


class Partial(_Event, frozen=True, kw_only=True, tag=True):
    """A State that a generator yielded: a partial reduction, or a partial result of an action.

    :ivar changed: the fields that differ from the Partial before of the same path (at first: from the State that
        the action was given).
    """

    changed: dict[str, Any]


class SubtaskStarted(_Event, frozen=True, kw_only=True, tag=True):
    """A subtask of a parallel action has begun.

    :ivar label: what a person calls it: given, or the action's name and the fields that its State was given.
    :ivar ordinal: 0, 1, 2, ... in the order in which subtasks were yielded.
    """

    label: str
    ordinal: int


class SubtaskRetried(_Event, frozen=True, kw_only=True, tag=True):
    """An attempt of a subtask has failed and another will follow. Earlier Items and Partials of this path are void.

    :ivar attempt: the attempt that failed.
    :ivar error: its error as ``Type: message``.
    :ivar wait: seconds until the next.
    """

    label: str
    ordinal: int
    error: str
    wait: float


class SubtaskFinished(_Event, frozen=True, kw_only=True, tag=True):
    """A subtask has ended, well or with an error. One that was cancelled tells no end: it is over when its action is.

    :ivar error: None if it succeeded, else its error as ``Type: message``.
    :ivar seconds: how long it ran.
    :ivar restored: whether an earlier run had finished it, so that its result came from the store.
    """

    label: str
    ordinal: int
    seconds: float
    error: str | None = None
    restored: bool = False


class ActionFinished(_Event, frozen=True, kw_only=True, tag=True):
    """An action has ended and its State is committed.

    :ivar written: the fields that it wrote.
    """

    written: dict[str, Any]


class RunFinished(_Event, frozen=True, kw_only=True, tag=True):
    """The run has ended; ``action`` is the one that it stopped at.

    :ivar state: all fields of the last State.
    """

    state: dict[str, Any]


class RunFailed(_Event, frozen=True, kw_only=True, tag=True):
    """The run has failed.

    :ivar error: qualified type and message.
    """

    error: str


class RunCancelled(_Event, frozen=True, kw_only=True, tag=True):
    """The run was cancelled; everything that it had started has ended."""


Event: TypeAlias = (
    RunStarted
    | ActionStarted
    | Item
    | Partial
    | SubtaskStarted
    | SubtaskRetried
    | SubtaskFinished
    | ActionFinished
    | RunFinished
    | RunFailed
    | RunCancelled
)
